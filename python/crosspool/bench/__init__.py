"""The load generator behind ``crosspool bench``: a workload of many models for any server with
OpenAI's API, what its requests took, and how two runs compare. No torch, no sglang."""
