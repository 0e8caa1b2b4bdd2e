"""How many prompt tokens a step may take beside requests that answer, so that the time between
their tokens keeps to a target."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosspool.scheduler.attention_rank import Flight

_WEIGHT = 0.25
"""Of a step's own time against what was expected before it."""


@dataclass
class _Estimate:
    """A running mean of seconds; ``value`` is a guess until the first is taken."""

    value: float
    known: bool = False

    def take(self, seconds: float, weight: float) -> None:
        self.value += (weight if self.known else 1.0) * (seconds - self.value)
        self.known = True


class ChunkBudget:
    """Of one attention rank: learns what its steps cost and sizes the next prompt chunk.

    A step's cost is its model's seconds per step and seconds per prompt token. Steps on several
    lanes share the rank part by part, so no step's own time shows on the clock: the time that
    passes is shared out among those on the lanes as their costs are expected to be, and when one
    ends, its model's costs follow the share that it got."""

    def __init__(
        self, models: int, *, lanes: int, page_size: int, most_tokens: int, target: float
    ) -> None:
        """``target``: seconds between two tokens; 0: none, every chunk has ``most_tokens``."""
        self._lanes = lanes
        self._page_size = page_size
        self._most_tokens = most_tokens
        self._target = target
        self._step = [_Estimate(1e-3) for _ in range(models)]
        self._token = [_Estimate(1e-4) for _ in range(models)]
        self._spent: dict[int, float] = {}
        """Seconds that a step in flight has had, by its number."""
        self._seen = 0.0

    def tokens(self, model: int, answering: Set[int]) -> int:
        """Prompt tokens that ``model``'s next step may take while requests of the models
        ``answering`` answer: what is left of the target beside a step of each, in whole pages and
        at least one, so that prompts go on whatever the load. Where models are more than lanes, a
        request that waits for a lane may find a second step on each of the others."""
        if not self._target or not answering:
            return self._most_tokens
        tokens = self._page_size
        if self._token[model].known:
            steps = sorted((self._step[m].value for m in answering | {model}), reverse=True)
            again = self._lanes - 1 if len(steps) > self._lanes else 0
            room = self._target - sum(steps) - sum(steps[:again])
            cost = self._token[model].value
            most = self._most_tokens
            fitting = int(room / cost) if room < most * cost else most
            tokens = max(tokens, fitting // self._page_size * self._page_size)
        return min(tokens, self._most_tokens)

    def share_out(self, flights: Iterable[Flight], now: float) -> None:
        """Time has passed for ``flights``; to be called before one is added or ends."""
        at_work = sorted(flights, key=lambda flight: flight.step)[: self._lanes]
        expected = [self._expected(flight) for flight in at_work]
        rate = (now - self._seen) / sum(expected) if any(expected) else 0.0
        for flight, seconds in zip(at_work, expected, strict=True):
            self._spent[flight.step] = self._spent.get(flight.step, 0.0) + seconds * rate
        self._seen = now

    def landed(self, flight: Flight) -> None:
        """``flight`` has ended, and its time is shared out."""
        seconds = self._spent.pop(flight.step, 0.0)
        step, token = self._step[flight.model], self._token[flight.model]
        if not flight.prompt_tokens:
            return step.take(seconds, _WEIGHT)
        beside = step.value if step.known else 0.0
        chunk = flight.prompt_tokens * token.value
        # A short chunk says little of the cost of a token.
        weight = _WEIGHT * chunk / (chunk + beside) if chunk else _WEIGHT
        token.take(max(seconds - beside, 0.0) / flight.prompt_tokens, weight)

    def _expected(self, flight: Flight) -> float:
        return (
            self._step[flight.model].value + flight.prompt_tokens * self._token[flight.model].value
        )
