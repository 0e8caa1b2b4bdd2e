"""What it is worth to keep a model's weights in memory: the rule by which models that have no
requests give way."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol


class Worth(Protocol):
    """Of models without requests, the one that is worth least gives way first."""

    def used(self, model: int) -> None:
        """A request for the model has come."""
        ...

    def gave_way(self, model: int) -> None:
        """The model's weights were given up for another's."""
        ...

    def of(self, model: int) -> float:
        """What it is worth to keep the model; only comparisons count."""
        ...


class FrequencyWithAging:
    """A model is worth the number of its requests, counted from the worth that the last model had
    that gave way: so what was often asked for goes, too, when it has not been for long.

    This is GreedyDual (Young, "On-line caching as cache size varies", SODA 1991; "The k-server dual
    and loose competitiveness for paging", Algorithmica 11, 1994) with frequency (LFU with dynamic
    aging: Arlitt et al., "Evaluating content management techniques for web proxy caches", 1999), in
    units of what a byte costs: reading takes as long as there are bytes, so that the cost of waking
    a model, divided by the bytes that sleeping frees, is the same for all."""

    def __init__(self) -> None:
        self._age = 0.0
        self._requests: dict[int, int] = defaultdict(int)
        self._worth: dict[int, float] = defaultdict(float)

    def used(self, model: int) -> None:
        self._requests[model] += 1
        self._worth[model] = self._age + self._requests[model]

    def gave_way(self, model: int) -> None:
        self._age = max(self._age, self._worth[model])

    def of(self, model: int) -> float:
        return self._worth[model]
