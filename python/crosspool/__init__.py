"""CrossPool: many cold MoE models from one KV pool and one weight pool (arXiv 2606.24506)."""

__version__ = "0.2.0"
