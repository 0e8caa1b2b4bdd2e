"""Loads the ranks of one GPU: KV pool, weights, and what :mod:`crosspool.ranks.gpu.join` makes of
them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import torch

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.config.gpu import check_alike
from crosspool.kernels.cuda_driver import CudaBindings
from crosspool.kernels.residency import Residency
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.models.gpu_features import check_features
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.gpu.compile import compile_deployment, telling_of_compilation
from crosspool.ranks.gpu.host_side import HostSide, allocations
from crosspool.ranks.gpu.join import GPUParts, join_lanes
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.shares import check_share
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.ranks.kv_memory import kv_pool_by
from crosspool.ranks.weights import held_models
from crosspool.transport.heartbeats import Heartbeat
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.links import join_gpus
from crosspool.weightpool.placement import Placement


def load_gpu_ranks(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
    *,
    kept: KeptDescriptors,
    heartbeat: Heartbeat | None = None,
) -> DeviceRanks:
    """Does what :func:`crosspool.ranks.device_process.load_ranks` says, on a GPU. At the start the
    processes of all GPUs of a deployment call it at once: they wait for the memory of each other's
    links."""
    check_alike(deployment.devices)
    torch.cuda.set_device(device.gpu)
    major, minor = torch.cuda.get_device_capability(device.gpu)
    compile_deployment(deployment, specs, placement, 10 * major + minor)
    residency = Residency(device.name, allocations)
    driver = CudaBindings(device.gpu, residency)
    with contextlib.ExitStack() as resources:
        resources.enter_context(residency.over_triton())
        host = HostSide(torch.device("cuda", device.gpu), residency)
        resources.callback(host.close)
        peers = join_gpus(
            deployment,
            device,
            lanes_fd,
            kept,
            specs=specs,
            driver=driver,
            resources=resources,
        )
        kv: Mapping[int, torch.Tensor] = {}
        virtualizer: CudaVirtualizer | None = None
        if device in deployment.kv_pool_devices:
            make = functools.partial(CudaVirtualizer, driver)
            virtualizer, kv = kv_pool_by(make, deployment, device, specs)
            resources.callback(virtualizer.close)
        parts = load_parts(deployment, device, specs, placement, kv, on=host.device)
        made = resources.enter_context(contextlib.ExitStack())
        with telling_of_compilation():
            ranks, _ = join_lanes(
                *(deployment, device, parts, peers),
                virtualizer=virtualizer,
                host=host,
                resources=made,
                heartbeat=heartbeat,
            )
        ranks.resources = resources.pop_all()
    return ranks


def load_parts(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    caches: Mapping[int, torch.Tensor],
    *,
    on: torch.device,
) -> GPUParts:
    """Loads the weights of the device's ranks. ``caches``: the models' KV, none without an
    attention rank.

    Raises ConfigError for a bad checkpoint, or a share that the kernels do not take."""
    parts = GPUParts(list(specs.values()))
    for held in held_models(deployment, device, specs, placement):
        check_features(deployment.models[held.index], held.spec)
        if held.ffn is not None:
            check_share(deployment.models[held.index], held.spec, held.ffn)
        with held.loading(device) as loaded:
            ffn = None
            if held.ffn is not None:
                ffn = GPUFFN(held.spec, held.path, held.ffn, on, loaded.progress)
                parts.ffns[held.index] = ffn
            if held.attention:
                kv = caches[held.index]
                positions = min(held.spec.context, kv.shape[0] * kv.shape[2])
                attention = GPUAttention(held.spec, held.path, on, positions, loaded.progress)
                parts.models.append(GPUModel(held.spec, attention, ffn, kv))
    return parts
