"""Judges the HTTP front door: hostile requests beside running streams, fuzzed requests, and SIGTERM
while the worst of them runs. ``python -m benchmark.front_door --help`` lists the programs."""
