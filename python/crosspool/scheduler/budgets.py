"""The budgets for weights: which models fit into the pools at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from crosspool.config.deployment import Deployment
from crosspool.models.spec import ModelSpec
from crosspool.weightpool.placement import place, rooms

Role = Literal["attention", "ffn"]


@dataclass(frozen=True)
class WeightPlace:
    """One rank's budget for weights."""

    device: int
    """Index of the rank's device in the deployment's devices."""
    role: Role
    budget: int | None
    """Bytes; None without a bound."""
    held: dict[int, int]
    """Bytes that each model takes here while its weights are in memory; a model that has no share
    of the place is left out."""


class Budgets:
    """The places for weights, and what each model takes of them."""

    def __init__(self, places: Seq[WeightPlace]) -> None:
        self.places = places

    @classmethod
    def of(cls, deployment: Deployment, specs: Mapping[int, ModelSpec]) -> Budgets:
        """The devices' rooms. Raises ConfigError when a model can never be resident."""
        devices = list(deployment.devices)
        return cls(
            [
                WeightPlace(
                    device=devices.index(room.device),
                    role="ffn" if room.option == "weight_pool_bytes" else "attention",
                    budget=room.bytes,
                    held={model: size for model, size in room.needed.items() if size},
                )
                for room in rooms(deployment, place(deployment, specs))
            ]
        )

    def add(self, model: int, deployment: Deployment, specs: Mapping[int, ModelSpec]) -> None:
        """A further model of the deployment comes."""
        for spot, further in zip(self.places, Budgets.of(deployment, specs).places, strict=True):
            if model in further.held:
                spot.held[model] = further.held[model]

    def remove(self, model: int) -> None:
        for spot in self.places:
            spot.held.pop(model, None)

    def bytes_of(self, model: int, role: Role) -> int:
        """Bytes of the model over all places of ``role``."""
        return sum(spot.held.get(model, 0) for spot in self.places if spot.role == role)

    def devices_of(self, model: int, role: Role) -> frozenset[int]:
        """Devices with a place of ``role`` that have a share of the model."""
        return frozenset(
            spot.device for spot in self.places if spot.role == role and model in spot.held
        )

    def crowded(self, models: Iterable[int], device: int | None = None) -> list[WeightPlace]:
        """Places (of ``device``) where ``models`` do not fit together."""
        together = set(models)
        return [
            spot
            for spot in self.places
            if device in (None, spot.device)
            and spot.budget is not None
            and sum(spot.held.get(model, 0) for model in together) > spot.budget
        ]
