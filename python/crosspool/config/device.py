"""Names of devices: ``cpu`` (every core this process may use), ``cpu:0-7``, ``cpu:0-3+8-11``,
``cuda:0``."""

from __future__ import annotations

import os
import re

import msgspec

_CPU = re.compile(r"cpu(?::(\d+(?:-\d+)?(?:\+\d+(?:-\d+)?)*))?")
_CUDA = re.compile(r"cuda:(\d+)")


class Device(msgspec.Struct, frozen=True):
    """What one resident loop owns: a set of cores or one GPU."""

    name: str
    """Name as the user wrote it."""

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu")

    @property
    def process_name(self) -> str:
        """What messages call the process of this device."""
        return f"device process {self.name}"

    @property
    def gpu(self) -> int:
        """Number of the GPU among those that a process may use; raises ValueError for a CPU."""
        match = _CUDA.fullmatch(self.name)
        if match is None:
            raise ValueError(f"{self.name} is not a GPU")
        return int(match.group(1))

    @property
    def cores(self) -> tuple[int, ...]:
        """Cores of a CPU device, ascending; raises ValueError for a GPU."""
        match = _CPU.fullmatch(self.name)
        if match is None:
            raise ValueError(f"{self.name} is not a CPU device")
        if match.group(1) is None:
            return tuple(sorted(os.sched_getaffinity(0)))
        cores: set[int] = set()
        for span in match.group(1).split("+"):
            first, _, last = span.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
        return tuple(sorted(cores))


def parse_devices(text: str) -> tuple[Device, ...]:
    """Parses a comma-separated list such as ``cpu:0,cpu:1`` or ``cpu:0-7+16-23``.

    Raises ValueError that says what is wrong with which entry."""
    devices: list[Device] = []
    for name in (part.strip() for part in text.split(",")):
        if not (_CPU.fullmatch(name) or _CUDA.fullmatch(name)):
            raise ValueError(
                f"{name!r} is no device: write cpu, cpu:0, cpu:0-7, cpu:0-3+8-11 or cuda:0"
            )
        device = Device(name)
        if device.is_cpu:
            missing = set(device.cores) - os.sched_getaffinity(0)
            if missing or not device.cores:
                raise ValueError(
                    f"{name}: cores {sorted(missing)} are not available to this process"
                )
        if device in devices:
            raise ValueError(f"{name} is named twice")
        devices.append(device)
    return tuple(devices)
