"""The memories that a deployment's devices draw from: the host's, which all CPU devices share, and
each GPU's own. Here is what each must hold, how much the KV pool takes when the user names no size,
and whether it holds the requests that it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.config.gpu import GPU
from crosspool.config.sizes import exact_size, format_size
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import ModelSpec
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


def memories(devices: Sequence[Device], gpus: Mapping[Device, GPU]) -> list[SystemMemory]:
    """Returns the memories that the devices draw from; each device is in one.
    ``gpus``: those among them."""
    found = []
    cpus = tuple(device for device in devices if device.is_cpu)
    if cpus:
        found.append(SystemMemory("memory", psutil.virtual_memory().available, cpus))
    for device, gpu in gpus.items():
        free = int(gpu.free_bytes * GPU_SHARE)
        found.append(SystemMemory(f"memory of {device.name}", free, (device,)))
    return found


def default_kv_bytes(
    deployment: Deployment,
    placement: Placement,
    found: Sequence[SystemMemory],
) -> int:
    """Returns the bytes of the KV pool when the user names none: on the host a share of the
    available memory, on GPUs as many on each as the weights leave on the fullest one."""
    kv = deployment.kv_pool_devices
    if all(device.is_cpu for device in kv):
        return min(int(found[0].available * KV_POOL_SHARE), KV_POOL_DEFAULT_LIMIT)
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


def check_kv_bounds(d: Deployment, specs: Sequence[ModelSpec]) -> None:
    """Raises ConfigError when the floors do not fit into the pool together, or when the KV memory
    that a model can be promised on one attention rank does not hold a request as long as its
    context."""
    bounds, ranks = Bounds.of(d), len(d.kv_pool_devices)
    if sum(bounds.floors) > bounds.budget:
        floors = sum(bounds.floors) * d.chunk_bytes * ranks
        raise ConfigError(
            f"kv_floor_bytes: the floors of all models come to {format_size(floors)} in whole "
            f"chunks, more than the KV pool's {format_size(d.kv_pool_bytes)}: lower them or give "
            "a larger --kv-pool-bytes"
        )
    for index, (model, spec) in enumerate(zip(d.models, specs, strict=True)):
        if bounds.ceilings[index] < bounds.floors[index]:
            raise ConfigError(
                f"kv_ceiling_bytes of {model.name}: {exact_size(model.kv_ceiling_bytes or 0)} is "
                f"below its kv_floor_bytes, {exact_size(model.kv_floor_bytes)} (in whole chunks of "
                "each device): raise the ceiling or lower the floor"
            )
        _check_longest(d, bounds, index, spec)


def _check_longest(d: Deployment, bounds: Bounds, index: int, spec: ModelSpec) -> None:
    """Raises ConfigError that says what would be enough when one request as long as the model's
    context does not fit."""
    model, ranks = d.models[index], len(d.kv_pool_devices)
    layout = KVLayout(spec, d.page_size, d.chunk_bytes)
    chunks = -(-layout.pages_for(spec.context) * layout.page_bytes // layout.chunk_bytes)
    if chunks <= bounds.reach(index):
        return
    tokens = layout.pages_in(bounds.reach(index)) * layout.page_size
    shorter = f"--context-length {tokens}, or " if tokens else ""
    needed = chunks * d.chunk_bytes * ranks
    request = f"do not hold one request of {spec.context} tokens, the context of {model.name}"
    if chunks > bounds.ceilings[index] and model.kv_ceiling_bytes is not None:
        raise ConfigError(
            f"kv_ceiling_bytes of {model.name}: {format_size(model.kv_ceiling_bytes)} on {ranks} "
            f"device(s) {request}: give {shorter}a ceiling of {exact_size(needed)}"
        )
    others = (sum(bounds.floors) - bounds.floors[index]) * d.chunk_bytes * ranks
    beside = f" beside the floors of other models, {format_size(others)}," if others else ""
    raise ConfigError(
        f"kv_pool_bytes: {format_size(d.kv_pool_bytes)} on {ranks} device(s){beside} {request}: "
        f"give {shorter}--kv-pool-bytes {exact_size(needed + others)}"
    )


def _weights(memory: SystemMemory, deployment: Deployment, placement: Placement) -> tuple[int, int]:
    """Most bytes of FFN weights and of attention weights in one memory at once."""
    most = {"weight_pool_bytes": 0, "attention_weight_bytes": 0}
    for room in rooms(deployment, placement):
        if room.device in memory.devices:
            every = sum(room.needed)
            most[room.option] += every if room.bytes is None else min(every, room.bytes)
    most["weight_pool_bytes"] += share_of(deployment) * _count(
        memory, deployment.weight_pool_devices
    )
    return most["weight_pool_bytes"], most["attention_weight_bytes"]


def _count(memory: SystemMemory, pool: Sequence[Device]) -> int:
    return sum(device in memory.devices for device in pool)
