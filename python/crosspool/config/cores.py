"""Which cores a process's threads run on, and for how long at a time.

A step lasts as long as the slowest of its device's cores, and a message that shares a core with a
step would wait for the rest of that step's time slice: several milliseconds.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct
from collections.abc import Iterable

from crosspool.config.device import Device

log = logging.getLogger(__name__)

CONTROL_SLICE_NS = 200_000
"""Time slice of threads that carry messages."""
DEFAULT_SLICE_NS = 0

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""System call numbers; glibc has had a function for this call only since 2.41."""
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr``: size, policy, flags, nice, priority, runtime, deadline, period."""
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def keep_off(devices: Iterable[Device]) -> None:
    """Keeps this thread, and those that it starts, off the cores of ``devices``, if it may use any
    others."""
    taken = {core for device in devices if device.is_cpu for core in device.cores}
    if others := os.sched_getaffinity(0) - taken:
        os.sched_setaffinity(0, others)


def set_slice(nanoseconds: int) -> None:
    """Sets the time slice of this thread, and of those that it starts. Linux honours it from 6.12
    on; earlier versions accept it without effect. Of two threads on a core, the one with the
    shorter slice runs as soon as it has something to do, if it has had no more than its share."""
    number = _SCHED_SETATTR.get(platform.machine())
    policy = os.sched_getscheduler(0)
    if number is None or policy != os.SCHED_OTHER:  # the user has chosen another policy
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, nanoseconds, 0, 0)
    if _syscall(number, 0, attributes, 0) != 0:
        log.warning(
            "the time slice of this thread stays the default: %s", os.strerror(ctypes.get_errno())
        )
