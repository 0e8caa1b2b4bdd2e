"""What CrossPool is measured with: servers, load, samples, records, plots.

Every module without an underscore that has a command is run as ``python -m benchmark.<name>``;
``--quick`` tries it out in seconds and records nothing.
"""
