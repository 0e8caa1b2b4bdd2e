"""Bounds of the models' promises on one attention rank, in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from crosspool.config.deployment import Deployment


@dataclass(frozen=True)
class Bounds:
    """The budget, and per model a floor, which the promises of others never take, and a ceiling of
    its own promises; both by the model's number. Models come and go."""

    budget: int
    floors: dict[int, int]
    ceilings: dict[int, int]

    @classmethod
    def of(cls, deployment: Deployment) -> Bounds:
        """Each attention rank has an even share of the pool, of every floor (rounded up to whole
        chunks) and of every ceiling."""
        d = deployment
        bounds = cls(d.kv_pool_bytes // len(d.kv_pool_devices) // d.chunk_bytes, {}, {})
        for number in d.models:
            bounds.add(d, number)
        return bounds

    @classmethod
    def without_floors(cls, budget: int, models: Iterable[int]) -> Bounds:
        numbers = list(models)
        return cls(budget, dict.fromkeys(numbers, 0), dict.fromkeys(numbers, budget))

    def add(self, deployment: Deployment, number: int) -> None:
        """A further model of the deployment comes."""
        model = deployment.models[number]
        chunk = len(deployment.kv_pool_devices) * deployment.chunk_bytes
        self.floors[number] = -(-model.kv_floor_bytes // chunk)
        self.ceilings[number] = (
            self.budget
            if model.kv_ceiling_bytes is None
            else min(self.budget, model.kv_ceiling_bytes // chunk)
        )

    def remove(self, number: int) -> None:
        """A model, to which nothing is promised, goes."""
        del self.floors[number], self.ceilings[number]

    def reach(self, model: int) -> int:
        """Chunks that the model's promises can come to when nobody else is promised any."""
        others = sum(self.floors.values()) - self.floors[model]
        return max(0, min(self.ceilings[model], self.budget - others))

    def allow(self, promised: Mapping[int, int]) -> bool:
        """Whether the models' promises may touch so many chunks each, and those of others none."""
        if any(chunks > self.ceilings[model] for model, chunks in promised.items()):
            return False
        return sum(max(promised.get(model, 0), floor) for model, floor in self.floors.items()) <= (
            self.budget
        )
