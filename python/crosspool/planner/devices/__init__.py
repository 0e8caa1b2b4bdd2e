"""Placement of weights and KV cache on devices under each way to serve, in bytes."""
