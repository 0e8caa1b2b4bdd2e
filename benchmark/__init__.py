"""Benchmarks of CrossPool: servers, loads, samples, records, plots.

A module with a command is run as ``python -m benchmark.<name>``. Where it takes ``--quick``, that
tries it out in seconds and records nothing.
"""
