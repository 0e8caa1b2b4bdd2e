"""Tensors that a device's ranks hold: which ones, filled from the checkpoint, and listed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosspool.models.spec import ModelSpec
from crosspool.observability.progress import Loading, Progress, loading
from crosspool.weightpool.checkpoint import Read
from crosspool.weightpool.gguf_checkpoint import open_checkpoint
from crosspool.weightpool.placement import FFNShard, Placement

if TYPE_CHECKING:  # a machine that runs the GPU's tests alone has no msgspec
    from crosspool.config.deployment import Deployment
    from crosspool.config.device import Device

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True, kw_only=True)
class TensorListing:
    """One tensor, or share of one, on a rank."""

    layer: int | None
    key: str
    name: str
    """The checkpoint's name for it."""
    shape: tuple[int, ...]
    """Shape of the share that the rank holds."""
    dtype: str
    bytes: int


def fill(
    path: Path, reads: Sequence[tuple[int | None, Read]], progress: Progress
) -> list[TensorListing]:
    """Checks that the checkpoint has every tensor as expected, and reads all of them into place.

    Raises ConfigError that names the wrong tensor or file."""
    checkpoint = open_checkpoint(path)
    checkpoint.check([read.ref for _, read in reads])
    checkpoint.load([read for _, read in reads], progress)
    return [
        TensorListing(
            layer=layer,
            key=read.ref.key,
            name=read.ref.name,
            shape=tuple(read.into.shape),
            dtype=str(read.into.dtype).removeprefix("torch."),
            bytes=read.into.nbytes,
        )
        for layer, read in reads
    ]


@dataclass(frozen=True)
class HeldModel:
    """What the ranks of one device hold of a model."""

    index: int
    """The model's number."""
    path: Path
    spec: ModelSpec
    attention: bool
    """Whether the device has an attention rank of the model, which holds the attention part."""
    ffn: FFNShard | None
    """The share of the FFN part; None: it lies on other devices."""
    what: str
    """Model and ranks, as the log names them."""
    bytes: int
    """Bytes of all tensors, but for routed experts on demand."""
    experts_on_demand: bool = False
    """Whether the FFN rank has its routed experts in the expert pool."""

    def loading(self, device: Device) -> contextlib.AbstractContextManager[Loading]:
        """Shows a progress bar for the model, and logs one line at the end."""
        return loading(device.name, self.what, self.bytes)


def held_models(
    deployment: Deployment, device: Device, specs: Mapping[int, ModelSpec], placement: Placement
) -> Iterator[HeldModel]:
    """The models of which the device holds weights."""
    attention_rank = ffn_rank = None
    if device in deployment.kv_pool_devices:
        attention_rank = deployment.kv_pool_devices.index(device)
    if device in deployment.weight_pool_devices:
        ffn_rank = deployment.weight_pool_devices.index(device)
    for index, model in deployment.models.items():
        spec = specs[index]
        ranks, total, shard = [], 0, None
        attends = attention_rank in deployment.attention_ranks(index)
        if attends:
            ranks.append(f"attention rank {attention_rank}")
            total += placement.attention_bytes[index]
        if ffn_rank is not None and index in placement.shards[ffn_rank]:
            ranks.append(f"FFN rank {ffn_rank}")
            shard = placement.shards[ffn_rank][index]
            total += placement.weight_bytes[ffn_rank][index]
        if ranks:
            what = f"{model.name} on {' and '.join(ranks)}"
            demand = shard is not None and model.experts == "demand"
            yield HeldModel(index, Path(model.path), spec, attends, shard, what, total, demand)
