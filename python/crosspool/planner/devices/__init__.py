"""Where weights and KV cache lie on devices under each way to serve, in bytes."""
