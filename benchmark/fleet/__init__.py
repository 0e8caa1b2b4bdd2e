"""Benchmarks of a fleet: more models than fit into the weight pool."""
