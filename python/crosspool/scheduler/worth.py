"""What it is worth to keep a model's weights in memory: the rule by which models that have no
requests give way."""

from __future__ import annotations

from itertools import count
from typing import Protocol

HALF_LIFE_PER_MODEL = 10
"""Requests for any model, per model of the fleet, after which a request counts half."""


class Worth(Protocol):
    """Of models without requests, the one that is worth least gives way first."""

    def used(self, model: int) -> None:
        """A request for the model has come."""
        ...

    def gave_way(self, model: int) -> None:
        """The model, which had no requests, was put to sleep for another."""
        ...

    def of(self, model: int) -> float:
        """What it is worth to keep the model; only comparisons count."""
        ...


class RecentRate:
    """A model is worth its requests, each of which counts half as much with every ``half_life``
    requests for any model that have come since.

    Keeping a model saves reading its bytes again as often as it is asked for, and takes as many
    bytes of room: per byte, that is its rate of requests, whatever its size. A rate of the recent
    past follows changes of popularity that plain counts do not, and knows popularity that the time
    of the last request does not show: over traces of both kinds, fewer models are woken than by
    LRU, LFU, or GreedyDual (``python -m benchmark.residency``)."""

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self._clock = count(1)
        self._now = 0
        self._sums: dict[int, tuple[int, float]] = {}
        """Each model's worth, and the number of the request at which it was that."""

    def used(self, model: int) -> None:
        self._now = next(self._clock)
        self._sums[model] = (self._now, 1.0 + self.of(model))

    def gave_way(self, model: int) -> None:
        pass

    def forget(self, model: int) -> None:
        """The model is gone."""
        self._sums.pop(model, None)

    def of(self, model: int) -> float:
        since, worth = self._sums.get(model, (self._now, 0.0))
        return float(worth * 0.5 ** ((self._now - since) / self.half_life))
