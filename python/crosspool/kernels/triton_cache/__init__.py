"""Kernels compiled ahead: what would be launched on a GPU that need not be there, compiled by many
processes at once into a cache that can be checked and packed."""
