"""Rules of what a model is worth, beside the scheduler's, to compare it with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count


class LeastRecentlyUsed:
    """A model is worth the time of its last request."""

    def __init__(self) -> None:
        self._clock = count(1)
        self._used: dict[int, int] = {}

    def used(self, model: int) -> None:
        self._used[model] = next(self._clock)

    def gave_way(self, model: int) -> None:
        pass

    def of(self, model: int) -> float:
        return self._used.get(model, 0)


class LeastFrequentlyUsed:
    """Counts every request since the start."""

    def __init__(self) -> None:
        self._used: Counter[int] = Counter()

    def used(self, model: int) -> None:
        self._used[model] += 1

    def gave_way(self, model: int) -> None:
        pass

    def of(self, model: int) -> float:
        return self._used[model]


class GreedyDual:
    """A model is worth its cost from its last request on, and all lose the worth of whoever gives
    way (Young 1994, there for pages of one size and different costs)."""

    def __init__(self, costs: Sequence[float]) -> None:
        self._costs = costs
        self._age = 0.0
        self._worth: dict[int, float] = {}

    def used(self, model: int) -> None:
        self._worth[model] = self._age + self._costs[model]

    def gave_way(self, model: int) -> None:
        self._age = max(self._age, self._worth.get(model, 0.0))

    def of(self, model: int) -> float:
        return self._worth.get(model, 0.0)


class FrequencyWithAging:
    """A model is worth the number of its requests, from the worth on that the last model had that
    gave way (LFU with dynamic aging: Arlitt et al., "Evaluating content management techniques for
    web proxy caches", 1999)."""

    def __init__(self) -> None:
        self._age = 0.0
        self._requests: Counter[int] = Counter()
        self._worth: dict[int, float] = {}

    def used(self, model: int) -> None:
        self._requests[model] += 1
        self._worth[model] = self._age + self._requests[model]

    def gave_way(self, model: int) -> None:
        self._age = max(self._age, self._worth.get(model, 0.0))

    def of(self, model: int) -> float:
        return self._worth.get(model, 0.0)
