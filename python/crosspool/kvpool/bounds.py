"""Bounds of the models' promises on one attention rank, in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosspool.config.deployment import Deployment


@dataclass(frozen=True)
class Bounds:
    """The budget, and per model a floor, which the promises of others never take, and a ceiling of
    its own promises."""

    budget: int
    floors: tuple[int, ...]
    ceilings: tuple[int, ...]

    @classmethod
    def of(cls, deployment: Deployment) -> Bounds:
        """Each attention rank has an even share of the pool, of every floor (rounded up to whole
        chunks) and of every ceiling."""
        d = deployment
        ranks = len(d.kv_pool_devices)
        budget = d.kv_pool_bytes // ranks // d.chunk_bytes
        return cls(
            budget=budget,
            floors=tuple(-(-model.kv_floor_bytes // (ranks * d.chunk_bytes)) for model in d.models),
            ceilings=tuple(
                budget
                if model.kv_ceiling_bytes is None
                else min(budget, model.kv_ceiling_bytes // (ranks * d.chunk_bytes))
                for model in d.models
            ),
        )

    @classmethod
    def without_floors(cls, budget: int, models: int) -> Bounds:
        return cls(budget, (0,) * models, (budget,) * models)

    def reach(self, model: int) -> int:
        """Chunks that the model's promises can come to when nobody else is promised any."""
        others = sum(self.floors) - self.floors[model]
        return max(0, min(self.ceilings[model], self.budget - others))

    def allow(self, promised: Sequence[int]) -> bool:
        """Whether the models' promises may touch so many chunks each."""
        return all(map(int.__le__, promised, self.ceilings)) and (
            sum(map(max, promised, self.floors)) <= self.budget
        )
