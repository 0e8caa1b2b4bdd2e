"""Names of devices: ``cpu`` (every core this process may use), ``cpu:0-7``, ``cpu:0-3+8-11``,
``cuda:0``, and those of other hosts of the deployment, ``node1/cpu:0-7``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import msgspec

_CPU = re.compile(r"cpu(?::(\d{1,5}(?:-\d{1,5})?(?:\+\d{1,5}(?:-\d{1,5})?)*))?")
_CUDA = re.compile(r"cuda:(\d{1,3})")
_CUDAS = re.compile(r"cuda:(\d{1,3})-(\d{1,3})")
_NODE = re.compile(r"node(0|[1-9]\d{0,3})/(.*)")


class Device(msgspec.Struct, frozen=True):
    """What one resident loop owns: a set of cores or one GPU, of one host of the deployment."""

    name: str
    """Name as the user wrote it, without ``node0/``."""

    @property
    def node(self) -> int:
        """Number of its host among those of the deployment, which SGLang calls nodes."""
        match = _NODE.fullmatch(self.name)
        return 0 if match is None else int(match.group(1))

    @property
    def name_on_host(self) -> str:
        """Its name without that of its host."""
        match = _NODE.fullmatch(self.name)
        return self.name if match is None else match.group(2)

    @property
    def is_cpu(self) -> bool:
        return self.name_on_host.startswith("cpu")

    @property
    def process_name(self) -> str:
        """What messages call the process of this device."""
        return f"device process {self.name}"

    @property
    def gpu(self) -> int:
        """Number of the GPU among those that a process on its host may use; raises ValueError for a
        CPU."""
        match = _CUDA.fullmatch(self.name_on_host)
        if match is None:
            raise ValueError(f"{self.name} is not a GPU")
        return int(match.group(1))

    @property
    def named_cores(self) -> tuple[int, ...] | None:
        """Cores that the name of a CPU device lists, ascending; None where it means every core of
        its host. Raises ValueError for a GPU."""
        match = _CPU.fullmatch(self.name_on_host)
        if match is None:
            raise ValueError(f"{self.name} is not a CPU device")
        if match.group(1) is None:
            return None
        cores: set[int] = set()
        for span in match.group(1).split("+"):
            first, _, last = span.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
        return tuple(sorted(cores))

    @property
    def cores(self) -> tuple[int, ...]:
        """Cores of a CPU device of this host, ascending; raises ValueError for a GPU."""
        named = self.named_cores
        return tuple(sorted(os.sched_getaffinity(0))) if named is None else named


def parse_devices(text: str) -> tuple[Device, ...]:
    """Parses a comma-separated list such as ``cpu:0,node1/cpu:0-7+16-23``; ``cuda:0-3`` names four
    GPUs, and ``node0/cpu:0`` is ``cpu:0``. Whether the hosts have such devices is not looked at.

    Raises ValueError that says what is wrong with which entry."""
    devices: list[Device] = []
    for name in (part.strip() for part in text.split(",")):
        for device in _devices_of(name):
            if device in devices:
                raise ValueError(f"{device.name} is named twice")
            devices.append(device)
    return tuple(devices)


def _devices_of(name: str) -> Iterator[Device]:
    """Yields the devices that one entry names. Raises ValueError."""
    match = _NODE.fullmatch(name)
    node, local = ("0", name) if match is None else match.groups()
    before = "" if node == "0" else f"node{node}/"
    if span := _CUDAS.fullmatch(local):
        first, last = map(int, span.groups())
        if last < first:
            raise ValueError(f"{name} names no GPU: write the smaller number first")
        yield from (Device(f"{before}cuda:{gpu}") for gpu in range(first, last + 1))
        return
    if not (_CPU.fullmatch(local) or _CUDA.fullmatch(local)):
        raise ValueError(
            f"{name!r} is no device: write cpu, cpu:0, cpu:0-7, cpu:0-3+8-11 or cuda:0; one of "
            "another host as node1/cpu:0-7"
        )
    device = Device(before + local)
    if device.is_cpu and device.named_cores == ():
        raise ValueError(f"{name} names no core: write the smaller number first")
    yield device
