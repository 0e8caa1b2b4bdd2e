"""The page budget: a quantile of pool demand in chunks per attention rank, compared with the sum of
what the models need separately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.quantile import QuantileEstimate


class Demand(Protocol):
    """The common interface of the three kinds of demand, in bytes of whole chunks."""

    @property
    def chunk_bytes(self) -> int: ...

    def quantile(self, quantile: float, level: float = ...) -> QuantileEstimate: ...

    def model_quantile(
        self, model: int, quantile: float, level: float = ...
    ) -> QuantileEstimate: ...

    def exceeds(self, nbytes: float) -> float: ...


class ModelBudget(msgspec.Struct, frozen=True):
    """One model's part of the budget."""

    name: str
    page_bytes: int
    rank_pages: int
    """Pages that the model can hold on an attention rank while no other model uses the pool."""
    own_bytes: int
    """The model's own demand at the quantile, in whole chunks: the size of its static partition."""
    longest_bytes: int
    """Bytes of one request of the model's longest context, in whole chunks."""


class Budget(msgspec.Struct, frozen=True):
    """The size of the KV pool for a quantile of demand."""

    demand: QuantileEstimate
    """Demand of all models together at the quantile, in bytes."""
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
        """Bytes on all attention ranks: the demand, rounded up to equal whole chunks per rank."""
        return self.ranks * self.rank_bytes

    @property
    def static_bytes(self) -> int:
        """Sum of the models' own demands at the same quantile, as static partitions need."""
        return sum(model.own_bytes for model in self.models)

    @property
    def longest_bytes(self) -> int:
        """Sum of the bytes of one request of the longest context per model."""
        return sum(model.longest_bytes for model in self.models)

    @property
    def saving(self) -> float:
        """Share of ``static_bytes`` that the common pool saves."""
        return 1 - self.pool_bytes / self.static_bytes if self.static_bytes else 0.0


def kv_budget(
    demand: Demand,
    kv_models: Sequence[KVModel],
    quantile: float,
    ranks: int,
    level: float = 0.95,
) -> Budget:
    """Returns the budget that demand stays within for ``quantile`` of the time, over ``ranks``
    attention ranks; ``level`` is the confidence of the quantile's interval. Ranks are assumed to
    fill evenly, as admission tries to achieve; a model with pages on several ranks may need one
    more chunk on each. Raises ConfigError when there is no rank."""
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
    """Returns the bytes of one request of the model's longest context, in whole chunks."""
    layout = kv.layout(chunk_bytes)
    return layout.chunks_for(layout.pages_for(kv.context)) * chunk_bytes
