"""The memories that a deployment's devices draw from: the host's, which all CPU devices share, and
each GPU's own. Here is what each must hold, and how much the KV pool takes when the user names no
size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.config.gpu import GPU
from crosspool.config.sizes import format_size
from crosspool.transport.host_messages import HostFacts
from crosspool.weightpool.experts import share_of
from crosspool.weightpool.placement import Placement, rooms

KV_POOL_SHARE = 0.2
"""Share of the host's available memory that the KV pool takes when the user names no size."""
KV_POOL_DEFAULT_LIMIT = 4 << 30
"""Most bytes that it then takes."""
GPU_SHARE = 0.92
"""Share of a GPU's free memory that weights and KV pool may take: the rest is for the CUDA context,
captured graphs and the scratch memory of a step."""


@dataclass(frozen=True)
class SystemMemory:
    """One memory, and the devices of the deployment that draw from it."""

    name: str
    """What messages call it: ``memory``, ``memory of cuda:0``."""
    available: int
    """Bytes that the deployment may take."""
    devices: tuple[Device, ...]


def available_bytes() -> int:
    """Returns the memory of this host that processes may take."""
    return int(psutil.virtual_memory().available)


def memories(
    devices: Sequence[Device], gpus: Mapping[Device, GPU], hosts: Mapping[int, HostFacts]
) -> list[SystemMemory]:
    """Returns the memories that the devices draw from; each device is in one.
    ``gpus``: those among them; ``hosts``: what each host has, by its number."""
    found = []
    for node, facts in sorted(hosts.items()):
        cpus = tuple(device for device in devices if device.is_cpu and device.node == node)
        name = f"memory of node {node}" if node else "memory"
        if cpus:
            found.append(SystemMemory(name, facts.available_bytes, cpus))
    for device, gpu in gpus.items():
        free = int(gpu.free_bytes * GPU_SHARE)
        found.append(SystemMemory(f"memory of {device.name}", free, (device,)))
    return found


def default_kv_bytes(
    deployment: Deployment,
    placement: Placement,
    found: Sequence[SystemMemory],
) -> int:
    """Returns the bytes of the KV pool when the user names none: on hosts a share of the memory
    that the fullest one has available, on GPUs as many on each as the weights leave on the fullest
    one."""
    kv = deployment.kv_pool_devices
    if all(device.is_cpu for device in kv):
        least = min(m.available for m in found if any(device in kv for device in m.devices))
        return min(int(least * KV_POOL_SHARE), KV_POOL_DEFAULT_LIMIT)
    left = []
    for memory in found:
        if any(device in kv for device in memory.devices):
            ffn, attention = _weights(memory, deployment, placement)
            left.append(max(0, memory.available - ffn - attention))
    return len(kv) * (min(left) // deployment.chunk_bytes) * deployment.chunk_bytes


def check_memory(
    deployment: Deployment,
    placement: Placement,
    found: Sequence[SystemMemory],
) -> None:
    """Raises ConfigError when a memory is too small for what its devices will hold."""
    per_rank = deployment.kv_pool_bytes // len(deployment.kv_pool_devices)
    for memory in found:
        ffn, attention = _weights(memory, deployment, placement)
        kv = per_rank * _count(memory, deployment.kv_pool_devices)
        needed = kv + ffn + attention
        if needed > memory.available:
            raise ConfigError(
                f"{format_size(needed)} are needed (KV pool {format_size(kv)}, "
                f"FFN weights {format_size(ffn)}, attention weights {format_size(attention)}), but "
                f"{format_size(memory.available)} of {memory.name} are available: serve fewer "
                "models or lower --kv-pool-bytes"
            )


def _weights(memory: SystemMemory, deployment: Deployment, placement: Placement) -> tuple[int, int]:
    """Most bytes of FFN weights and of attention weights in one memory at once."""
    most = {"weight_pool_bytes": 0, "attention_weight_bytes": 0}
    for room in rooms(deployment, placement):
        if room.device in memory.devices:
            every = sum(room.needed.values())
            most[room.option] += every if room.bytes is None else min(every, room.bytes)
    most["weight_pool_bytes"] += share_of(deployment) * _count(
        memory, deployment.weight_pool_devices
    )
    return most["weight_pool_bytes"], most["attention_weight_bytes"]


def _count(memory: SystemMemory, pool: Sequence[Device]) -> int:
    return sum(device in memory.devices for device in pool)
