"""Describes the machine that a figure comes from, and how busy it is."""

from __future__ import annotations

import os

from crosspool.observability.machine import describe

__all__ = ["busy_seconds", "describe", "load1"]


def load1() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


def busy_seconds() -> float:
    """Return the CPU seconds that all cores have worked since the machine's start, with those that
    a hypervisor took from them."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
