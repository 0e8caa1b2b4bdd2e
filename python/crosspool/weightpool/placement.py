"""Which FFN rank holds which share of which tensor, and whether all of them fit.

A model lies on all FFN ranks or on some of them, and these alone share it.
Tensor-parallel: gate and up projections are cut along their rows, down projections along their
columns, so that a rank's output is a partial sum; routers are on every rank. Expert-parallel:
routed experts go whole to one rank each, in contiguous runs; the rest is as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from crosspool.config.errors import ConfigError
from crosspool.models.registry import attention_tensors, ffn_tensors
from crosspool.models.spec import DTYPE_BYTES, FFNSpec, ModelSpec, MoEFFN, TensorRef

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment

_GIB = 1 << 30


def _share(size: int, rank: int, ranks: int) -> slice:
    return slice(size * rank // ranks, size * (rank + 1) // ranks)


@dataclass(frozen=True, kw_only=True)
class FFNShard:
    """One FFN rank's share of every layer of a model."""

    rank: int
    """Place of the rank among the model's FFN ranks."""
    ranks: int
    """Number of FFN ranks that share the model."""
    parallel: Literal["tp", "ep"]

    def experts(self, ffn: MoEFFN) -> range:
        """Routed experts of which this rank holds anything."""
        if self.parallel == "tp":
            return range(ffn.experts)
        share = _share(ffn.experts, self.rank, self.ranks)
        return range(share.start, share.stop)

    def width(self, intermediate: int) -> int:
        """This rank's columns of an intermediate dimension that the ranks share."""
        share = _share(intermediate, self.rank, self.ranks)
        return int(share.stop - share.start)

    def slice(self, ref: TensorRef, ffn: FFNSpec) -> tuple[slice, ...] | None:
        """The rank's part of a tensor of a layer of ``ffn``, one slice per dimension with both
        ends given; None when it holds none of it."""
        whole = tuple(slice(0, size) for size in ref.shape)
        if ref.expert is not None and isinstance(ffn, MoEFFN) and self.parallel == "ep":
            return whole if ref.expert in self.experts(ffn) else None
        if ref.split is None:
            return whole
        share = _share(ref.shape[ref.split], self.rank, self.ranks)
        return (*whole[: ref.split], share, *whole[ref.split + 1 :])


@dataclass(frozen=True, kw_only=True)
class Placement:
    shards: tuple[dict[int, FFNShard], ...]
    """Shares of the models that lie on each FFN rank, indexed [FFN rank][model]."""
    weight_bytes: tuple[tuple[int, ...], ...]
    """Bytes that each FFN rank holds of each model, indexed [FFN rank][model]; 0 where it holds
    nothing."""

    @property
    def pool_bytes(self) -> int:
        """Bytes of the smallest weight pool that holds everything. Ranks share the pool evenly, so
        it gives every rank what the fullest needs."""
        return len(self.weight_bytes) * max(map(sum, self.weight_bytes))


def held_bytes(ref: TensorRef, spec: ModelSpec, index: tuple[slice, ...]) -> int:
    """Bytes of a part of a tensor in memory."""
    dtype = "float32" if ref.keep_fp32 else spec.dtype
    elements: int = math.prod(part.stop - part.start for part in index)
    return elements * DTYPE_BYTES[dtype]


def ffn_bytes(spec: ModelSpec, shard: FFNShard) -> int:
    """Bytes of a model's FFN weights on one rank."""
    return sum(
        held_bytes(ref, spec, index)
        for layer, ffn in enumerate(spec.ffn)
        for ref in ffn_tensors(spec, layer)
        if (index := shard.slice(ref, ffn)) is not None
    )


def attention_bytes(spec: ModelSpec) -> int:
    """Bytes of a model's attention part, which every attention rank holds."""
    return sum(
        held_bytes(ref, spec, tuple(slice(0, size) for size in ref.shape))
        for _, ref in attention_tensors(spec)
    )


def place(deployment: Deployment, specs: Sequence[ModelSpec]) -> Placement:
    """Shares every model's FFN weights among its FFN ranks.

    Raises ConfigError when a rank would hold more than its share of ``weight_pool_bytes``."""
    shards: tuple[dict[int, FFNShard], ...] = tuple({} for _ in deployment.weight_pool_devices)
    for model in range(len(specs)):
        ranks = deployment.ffn_ranks(model)
        for index, rank in enumerate(ranks):
            shards[rank][model] = FFNShard(
                rank=index, ranks=len(ranks), parallel=deployment.ffn_parallel
            )
    weight_bytes = tuple(
        tuple(
            ffn_bytes(spec, of_rank[model]) if model in of_rank else 0
            for model, spec in enumerate(specs)
        )
        for of_rank in shards
    )
    placement = Placement(shards=shards, weight_bytes=weight_bytes)
    _check_budget(deployment, placement)
    return placement


def _check_budget(deployment: Deployment, placement: Placement) -> None:
    """Raises ConfigError that names the fullest device when that is too full."""
    devices = deployment.weight_pool_devices
    held = [sum(of_rank) for of_rank in placement.weight_bytes]
    fullest = held.index(max(held))
    budget = deployment.weight_pool_bytes // len(devices)
    if held[fullest] <= budget:
        return
    models = ", ".join(
        f"{model.name} {size / _GIB:.3f} GiB"
        for model, size in zip(deployment.models, placement.weight_bytes[fullest], strict=True)
        if size
    )
    elsewhere = (
        ", place models elsewhere with their weight_pool_devices" if len(devices) > 1 else ""
    )
    raise ConfigError(
        f"weight_pool_bytes is too small: the FFN weights on {devices[fullest].name} ({models}) "
        f"need {held[fullest]} bytes, and each of the weight pool's {len(devices)} device(s) has "
        f"{budget}. Raise it to {placement.pool_bytes}{elsewhere}, add weight pool devices, or "
        "serve fewer models"
    )
