"""Which FFN rank holds which share of which tensor, and whether all of them fit.

Tensor-parallel: gate and up projections are cut along their rows, down projections along their
columns, so that a rank's output is a partial sum; routers are on every rank. Expert-parallel:
routed experts go whole to one rank each, in contiguous runs; the rest is as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from crosspool.config.deployment import ConfigError
from crosspool.models.registry import attention_tensors, ffn_tensors
from crosspool.models.spec import DTYPE_BYTES, FFNSpec, ModelSpec, MoEFFN, TensorRef

_GIB = 1 << 30


def _share(size: int, rank: int, ranks: int) -> slice:
    return slice(size * rank // ranks, size * (rank + 1) // ranks)


class FFNShard(msgspec.Struct, frozen=True, kw_only=True):
    """One FFN rank's share of every layer."""

    rank: int
    ranks: int
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
        return share.stop - share.start

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


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    shards: tuple[FFNShard, ...]
    """One per FFN rank."""
    weight_bytes: tuple[tuple[int, ...], ...]
    """Bytes held, by rank and model."""


def held_bytes(ref: TensorRef, spec: ModelSpec, index: tuple[slice, ...]) -> int:
    """Bytes of a part of a tensor in memory."""
    dtype = "float32" if ref.keep_fp32 else spec.dtype
    return math.prod(part.stop - part.start for part in index) * DTYPE_BYTES[dtype]


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


def place(
    specs: Sequence[ModelSpec],
    names: Sequence[str],
    ranks: int,
    bytes_per_rank: int,
    parallel: Literal["tp", "ep"],
) -> Placement:
    """Shares all models' FFN weights among ``ranks`` FFN ranks.

    ``names`` are the models' names, for the message. Raises ConfigError when a rank would hold
    more than ``bytes_per_rank``."""
    shards = tuple(FFNShard(rank=rank, ranks=ranks, parallel=parallel) for rank in range(ranks))
    weight_bytes = tuple(tuple(ffn_bytes(spec, shard) for spec in specs) for shard in shards)
    needed = max(sum(of_rank) for of_rank in weight_bytes)
    if needed > bytes_per_rank:
        models = ", ".join(
            f"{name} {sum(of_rank[model] for of_rank in weight_bytes) / _GIB:.3f} GiB"
            for model, name in enumerate(names)
        )
        raise ConfigError(
            f"weight_pool_bytes is too small: the FFN weights ({models}) need {needed} bytes on "
            f"each of {ranks} FFN ranks, {needed * ranks} in all; there are {bytes_per_rank} per "
            "rank. Raise it, add weight pool devices, or serve fewer models"
        )
    return Placement(shards=shards, weight_bytes=weight_bytes)
