"""How device processes show the launcher that they go on: a segment of memory in which each of them
counts.

The segment (a memfd that the launcher creates and every device process inherits) holds a record per
device, in the order of ``deployment.own_devices``. A record has lines of 64 bytes, of which only
the beginning is used::

    line 0   64-bit number   counted up by the process's main thread; 0: nobody is to look
             32-bit number   the process's incarnation
             32-bit number   its pid
         1   32-bit number   what the resident loop does: :class:`Activity`
             32-bit number   counted up by it when it finds no work; 0: there is no such loop
      2, …   64-bit number   counted up by a thread of the resident loop, one line each; of a GPU
                             there is one, in which its process counts what the GPU has begun

The header heartbeat.h of sgl-kernel-ext/include/crosspool is the same for native code.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosspool.config.device import Device

LINE_BYTES = 64
_FIRST_THREAD = 2


class Activity(enum.IntEnum):
    """What a resident loop does."""

    IDLE = 0
    COMPUTING = 1
    WAITING = 2
    """It has steps in flight, and only other devices' replies can let it go on."""
    READING = 3
    """It has work that waits for weights, which are being read."""


@dataclass(frozen=True)
class Beat:
    """What a device shows at a moment."""

    incarnation: int
    """Of the process that shows it, which may be dead; 0: there was none."""
    pid: int
    process: int
    """0 while nobody is to look at it: it is loading, or ending."""
    activity: int
    """An :class:`Activity`, unless the device has written something else."""
    looks: int
    """How often the resident loop has looked for work in vain; 0: nobody is to look at a loop."""
    advances: int
    """Sum over the threads of the resident loop."""


def _record_bytes(devices: Sequence[Device]) -> int:
    most = max((_threads(device) for device in devices), default=0)
    return LINE_BYTES * (_FIRST_THREAD + most)


def _threads(device: Device) -> int:
    return len(device.cores) if device.is_cpu else 1


class Heartbeats:
    """The segment, in the launcher. ``fd`` is handed on to device processes.

    Raises OSError when the system refuses it."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._bytes = _record_bytes(devices)
        self.fd = os.memfd_create("crosspool heartbeats", os.MFD_CLOEXEC)
        size = self._bytes * max(1, len(devices))  # a host may have no devices
        os.ftruncate(self.fd, size)
        self._memory = mmap.mmap(self.fd, size)

    def read(self, index: int) -> Beat:
        """Returns what the device of that index shows."""
        at = index * self._bytes
        lines = range(_FIRST_THREAD, _FIRST_THREAD + _threads(self._devices[index]))
        return Beat(
            incarnation=self._number(at + 8, 4),
            pid=self._number(at + 12, 4),
            process=self._number(at),
            activity=self._number(at + LINE_BYTES, 4),
            looks=self._number(at + LINE_BYTES + 4, 4),
            advances=sum(self._number(at + LINE_BYTES * line) for line in lines),
        )

    def _number(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self._memory[at : at + size], "little")

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)


class Heartbeat:
    """A device's record, in its process, which is the only one now. Without ``fd`` nobody sees it.

    Raises OSError or ValueError for a descriptor that is none of such a segment."""

    def __init__(
        self, devices: Sequence[Device], device: Device, fd: int | None, incarnation: int
    ) -> None:
        size = _record_bytes(devices)
        whole = size * len(devices)
        memory = mmap.mmap(-1, whole) if fd is None else mmap.mmap(fd, whole)
        # Stays mapped as long as this object: native threads write to it.
        self._record = (ctypes.c_uint8 * size).from_buffer(memory, size * devices.index(device))
        ctypes.memset(self._record, 0, size)
        self._process = ctypes.c_uint64.from_buffer(self._record)
        ctypes.c_uint32.from_buffer(self._record, 8).value = incarnation
        ctypes.c_uint32.from_buffer(self._record, 12).value = os.getpid()
        self._activity = ctypes.c_uint32.from_buffer(self._record, LINE_BYTES)
        self._looks = ctypes.c_uint32.from_buffer(self._record, LINE_BYTES + 4)
        self._advances = ctypes.c_uint64.from_buffer(self._record, _FIRST_THREAD * LINE_BYTES)

    @property
    def loop_address(self) -> int:
        """Address of the lines of the resident loop, laid out as in heartbeat.h."""
        return ctypes.addressof(self._record) + LINE_BYTES

    def beat(self) -> None:
        """Shows that the process's main thread goes on; from the first call on it must be called
        again and again."""
        self._process.value += 1

    def show(self, activity: Activity, looks: int, advances: int) -> None:
        """Tells for a GPU, which does not write here itself, what a loop would: ``advances`` is how
        much it has begun so far."""
        self._activity.value, self._advances.value = activity, advances
        self._looks.value = looks & 0xFFFFFFFF or 1

    def rest(self) -> None:
        """Ends what :meth:`beat` began."""
        self._process.value = 0
