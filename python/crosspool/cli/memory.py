"""The memories that a deployment's devices draw from: the host's, shared by all CPU devices, and
each GPU's own. What each must hold, and how much the KV pool takes where the user names no size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.config.gpu import gpu_of, visible_gpus
from crosspool.config.sizes import format_size
from crosspool.models.spec import ModelSpec
from crosspool.weightpool.placement import Placement, attention_bytes

KV_POOL_SHARE = 0.2
"""Part of the host's available memory that the KV pool takes when the user names no size."""
KV_POOL_DEFAULT_LIMIT = 4 << 30
GPU_SHARE = 0.92
"""Part of a GPU's free memory that weights and KV pool may take: the rest is for the CUDA context,
captured graphs and what a step works in."""


@dataclass(frozen=True)
class Memory:
    """One memory, and the devices of the deployment that draw from it."""

    name: str
    """For the user: ``memory``, ``memory of cuda:0``."""
    available: int
    """Bytes that the deployment may take."""
    devices: tuple[Device, ...]


def memories(devices: Sequence[Device]) -> list[Memory]:
    """Of the devices; each of them is in one.

    Raises ConfigError for a GPU that is not there."""
    found = []
    cpus = tuple(device for device in devices if device.is_cpu)
    if cpus:
        found.append(Memory("memory", psutil.virtual_memory().available, cpus))
    named = [device for device in devices if not device.is_cpu]
    try:
        gpus = visible_gpus() if named else []
    except ConfigError as error:
        raise ConfigError(f"{', '.join(device.name for device in named)}: {error}") from None
    for device in named:
        free = int(gpu_of(device, gpus).free_bytes * GPU_SHARE)
        found.append(Memory(f"memory of {device.name}", free, (device,)))
    return found


def default_kv_bytes(
    deployment: Deployment,
    specs: Sequence[ModelSpec],
    placement: Placement,
    found: Sequence[Memory],
) -> int:
    """Bytes of the KV pool where the user names none: on the host a share of what is available, on
    GPUs what the weights leave of the one that has least."""
    kv = deployment.kv_pool_devices
    if all(device.is_cpu for device in kv):
        return min(int(found[0].available * KV_POOL_SHARE), KV_POOL_DEFAULT_LIMIT)
    left = []
    for memory in found:
        if any(device in kv for device in memory.devices):
            ffn, attention = _weights(memory, deployment, specs, placement)
            left.append(max(0, memory.available - ffn - attention))
    return len(kv) * (min(left) // deployment.chunk_bytes) * deployment.chunk_bytes


def check_memory(
    deployment: Deployment,
    specs: Sequence[ModelSpec],
    placement: Placement,
    found: Sequence[Memory],
) -> None:
    """Raises ConfigError when a memory is too small for what its devices will hold."""
    per_rank = deployment.kv_pool_bytes // len(deployment.kv_pool_devices)
    for memory in found:
        ffn, attention = _weights(memory, deployment, specs, placement)
        kv = per_rank * _count(memory, deployment.kv_pool_devices)
        needed = kv + ffn + attention
        if needed > memory.available:
            raise ConfigError(
                f"{format_size(needed)} are needed (KV pool {format_size(kv)}, "
                f"FFN weights {format_size(ffn)}, attention weights {format_size(attention)}), "
                f"{format_size(memory.available)} of {memory.name} are available: serve fewer "
                "models or lower --kv-pool-bytes"
            )


def _weights(
    memory: Memory, deployment: Deployment, specs: Sequence[ModelSpec], placement: Placement
) -> tuple[int, int]:
    """Bytes of FFN weights and of attention weights in one memory."""
    ffn = sum(
        sum(held)
        for device, held in zip(deployment.weight_pool_devices, placement.weight_bytes, strict=True)
        if device in memory.devices
    )
    attention = sum(map(attention_bytes, specs)) * _count(memory, deployment.kv_pool_devices)
    return ffn, attention


def _count(memory: Memory, pool: Sequence[Device]) -> int:
    return sum(device in memory.devices for device in pool)
