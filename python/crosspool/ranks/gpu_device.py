"""Loads the ranks of one GPU: weights, KV pool, stages, graphs, and the loop that drives them.

:func:`join_lanes` puts stages and a loop together over any torch device; on CPU tensors, with
Triton's interpreter, it makes the same device without graphs, as the tests do.
Nothing here has run on a GPU yet (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.kvpool.virtualizer import Virtualizer
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks, gpu_kv_pool, loading
from crosspool.ranks.gpu_executor import GPUExecutor
from crosspool.ranks.gpu_inputs import HostMemory
from crosspool.ranks.gpu_lanes import make_loop, make_stages
from crosspool.ranks.gpu_rank import GPURank
from crosspool.ranks.gpu_stages import GPUModel, buckets_up_to
from crosspool.ranks.gpu_trace import GPUTrace
from crosspool.ranks.gpu_weights import GPUFFN, GPUAttention
from crosspool.transport.data_path import LocalLink
from crosspool.weightpool.placement import Placement, attention_bytes


@dataclass
class GPUFFNRank:
    """The FFN rank of a GPU; ``parts`` by the model's index."""

    rank: int
    parts: dict[int, GPUFFN]
    links: Sequence[LocalLink]


def load_gpu_ranks(
    deployment: Deployment, device: Device, specs: Sequence[ModelSpec], placement: Placement
) -> DeviceRanks:
    """As :func:`crosspool.ranks.device.load_ranks`, for a GPU that has both pools."""
    if deployment.devices != (device,):
        raise ConfigError(f"device {device.name}: a GPU serves both pools by itself for now")
    torch.cuda.set_device(device.gpu)
    gpu = torch.device("cuda", device.gpu)
    resources = contextlib.ExitStack()
    virtualizer, kv = gpu_kv_pool(deployment, device, specs)
    resources.callback(virtualizer.close)
    models = load_models(deployment, device, specs, placement, kv, on=gpu)
    ranks, executor = join_lanes(deployment, models, virtualizer, gpu, resources)
    virtualizer.quiesced = executor.quiesced
    return ranks


def load_models(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    caches: Sequence[torch.Tensor],
    *,
    on: torch.device,
) -> list[GPUModel]:
    """Weights of all models, beside their KV caches. Raises ConfigError for a bad checkpoint."""
    models = []
    for index, (model, spec, kv) in enumerate(zip(deployment.models, specs, caches, strict=True)):
        path, positions = Path(model.path), min(spec.context, kv.shape[0] * kv.shape[2])
        with loading(device, f"attention part of {model.name}", attention_bytes(spec)) as progress:
            attention = GPUAttention(spec, path, on, positions, progress)
        total = placement.weight_bytes[0][index]
        with loading(device, f"FFN part of {model.name}", total) as progress:
            ffn = GPUFFN(spec, path, placement.shards[0][index], on, progress)
        models.append(GPUModel(spec, attention, ffn, kv))
    return models


def join_lanes(
    deployment: Deployment,
    models: Sequence[GPUModel],
    virtualizer: Virtualizer,
    device: torch.device,
    resources: contextlib.ExitStack,
) -> tuple[DeviceRanks, GPUExecutor]:
    """Stages and host memory of every lane, and the loop over them.

    Raises ConfigError for a model whose layers a GPU does not drive."""
    specs = [model.spec for model in models]
    on_gpu = device.type == "cuda"
    buckets = buckets_up_to(deployment.max_step_tokens)
    lanes, stages = make_stages(
        models, buckets, deployment.lanes, deployment.max_running_requests, device
    )
    memory = [
        HostMemory(
            max(of_model.layout.elements for of_model in stages.values()),
            deployment.max_running_requests,
            deployment.lease_steps,
            pinned=on_gpu,
        )
        for _ in lanes
    ]
    resident = on_gpu and deployment.loop == "resident"
    trace = GPUTrace(resident=resident)
    loop = make_loop(models, lanes, stages, buckets, resident=resident, watch=trace)
    links = [LocalLink(0, lane, 0) for lane in range(deployment.lanes)]
    kv = [model.kv for model in models]
    attention = GPURank(0, specs, [model.attention for model in models], virtualizer, kv)
    executor = GPUExecutor(
        attention,
        loop,
        buckets=buckets,
        stages=stages,
        memory=memory,
        counters=[link.counters for link in links],
        pinned=on_gpu,
    )
    resources.callback(executor.close)
    ranks = DeviceRanks(
        deployment=deployment,
        executor=executor,
        attention=attention,
        ffn=GPUFFNRank(0, {i: model.ffn for i, model in enumerate(models)}, links),
        links=[[link] for link in links],
        transport=None,
        trace=trace,
        resources=resources,
    )
    return ranks, executor
