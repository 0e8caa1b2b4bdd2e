"""The page budget: a quantile of pool demand as chunks per attention rank, beside what the same
models need when none shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.quantile import QuantileEstimate


class Demand(Protocol):
    """What DemandSamples, ExactDemand and ReplayDemand have in common. Bytes, whole chunks."""

    @property
    def chunk_bytes(self) -> int: ...

    def quantile(self, quantile: float, level: float = ...) -> QuantileEstimate: ...

    def model_quantile(
        self, model: int, quantile: float, level: float = ...
    ) -> QuantileEstimate: ...

    def exceeds(self, nbytes: float) -> float: ...


class ModelBudget(msgspec.Struct, frozen=True):
    """One model's part."""

    name: str
    page_bytes: int
    rank_pages: int
    """Pages that the model has on an attention rank when no other model uses the pool."""
    own_bytes: int
    """The model's own demand at the quantile, whole chunks: its static partition."""
    longest_bytes: int
    """One request of the model's longest context, whole chunks."""


class Budget(msgspec.Struct, frozen=True):
    """The KV pool for a quantile of demand."""

    demand: QuantileEstimate
    """Bytes of all models together."""
    chunk_bytes: int
    ranks: int
    rank_chunks: int
    """Chunks per attention rank."""
    models: tuple[ModelBudget, ...]

    @property
    def rank_bytes(self) -> int:
        return self.rank_chunks * self.chunk_bytes

    @property
    def pool_bytes(self) -> int:
        """All attention ranks: the demand, rounded up so that each has as many chunks."""
        return self.ranks * self.rank_bytes

    @property
    def static_bytes(self) -> int:
        """Sum of the models' own demand at the same quantile: a partition for each."""
        return sum(model.own_bytes for model in self.models)

    @property
    def longest_bytes(self) -> int:
        """Sum of one request of longest context per model."""
        return sum(model.longest_bytes for model in self.models)

    @property
    def saving(self) -> float:
        """Share of ``static_bytes`` that the common pool does without."""
        return 1 - self.pool_bytes / self.static_bytes if self.static_bytes else 0.0


def kv_budget(
    demand: Demand,
    kv_models: Sequence[KVModel],
    quantile: float,
    ranks: int,
    level: float = 0.95,
) -> Budget:
    """The budget that demand stays within for ``quantile`` of the time, over ``ranks`` attention
    ranks. ``level``: of the quantile's interval. Ranks are taken as evenly filled, which admission
    strives for; where a model has pages on several, each may add a chunk begun.

    Raises ConfigError when there is no rank."""
    if ranks < 1:
        raise ConfigError(f"ranks: {ranks}; a KV pool has at least one attention rank")
    pool, chunk = demand.quantile(quantile, level), demand.chunk_bytes
    rank_chunks = -(-int(pool.value) // (chunk * ranks))
    models = tuple(
        ModelBudget(
            kv.name,
            kv.page_bytes,
            kv.layout(chunk).pages_in(rank_chunks),
            int(demand.model_quantile(index, quantile, level).value),
            longest_bytes(kv, chunk),
        )
        for index, kv in enumerate(kv_models)
    )
    return Budget(pool, chunk, ranks, rank_chunks, models)


def longest_bytes(kv: KVModel, chunk_bytes: int) -> int:
    """Whole chunks under one request of the model's longest context."""
    layout = kv.layout(chunk_bytes)
    return layout.chunks_for(layout.pages_for(kv.context)) * chunk_bytes
