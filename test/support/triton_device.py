"""The ranks of a GPU for tests: on it, or on CPU tensors, its stages called one by one and Triton's
kernels interpreted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks, kv_pool
from crosspool.ranks.gpu_device import join_lanes, load_gpu_ranks, load_models
from crosspool.ranks.gpu_executor import GPUExecutor
from crosspool.weightpool.placement import Placement


def load_interpreted(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    _lanes_fd: int | None,
) -> DeviceRanks:
    """As :func:`crosspool.ranks.gpu_device.load_gpu_ranks`."""
    cpu = torch.device("cpu")
    virtualizer, kv = kv_pool(deployment, device, specs)
    resources = contextlib.ExitStack()
    resources.callback(virtualizer.close)
    models = load_models(deployment, device, specs, placement, kv, on=cpu)
    ranks, _ = join_lanes(deployment, models, virtualizer, cpu, resources)
    return ranks


def load_compiled(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    _lanes_fd: int | None,
) -> DeviceRanks:
    """A GPU's, with the KV memory that is mapped first full of NaN."""
    ranks = load_gpu_ranks(deployment, device, specs, placement)
    assert ranks.attention is not None and isinstance(ranks.executor, GPUExecutor)
    virtualizer = ranks.attention.virtualizer
    for model, kv in enumerate(ranks.attention.kv):
        chunks = list(range(virtualizer.free_bytes // deployment.chunk_bytes))
        virtualizer.map(model, chunks)
        pages = len(chunks) * deployment.chunk_bytes // (kv[0].nbytes)
        with ranks.executor.quiesced():  # the device is never idle while a loop is resident
            kv[:pages].fill_(torch.nan)
            torch.cuda.synchronize()
        virtualizer.unmap(model, chunks)
    return ranks


def shallow(
    checkpoint: Path, folder: Path, layers: int | None = None, dtype: str | None = None
) -> Path:
    """The first layers of a checkpoint (None: all), in a dtype (None: its own): its files beside a
    config.json that says so."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
        for field in ("mlp_layer_types", "layer_types"):
            if field in config:
                config[field] = config[field][:layers]
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
