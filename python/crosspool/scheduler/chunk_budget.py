"""How many prompt tokens a step may take beside requests that generate, so that the time between
their tokens keeps to a target.

To add another way to decide it, write its class here and let :func:`chunk_budget` choose it by an
option.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Protocol

from crosspool.config.deployment import Deployment
from crosspool.scheduler.flight import StepInFlight

_WEIGHT = 0.25
"""Weight of a new measurement in a running mean."""


@dataclass
class _Estimate:
    """A running mean of seconds; ``value`` is a guess until the first measurement."""

    value: float
    known: bool = False

    def take(self, seconds: float, weight: float) -> None:
        self.value += (weight if self.known else 1.0) * (seconds - self.value)
        self.known = True


@dataclass
class _Length:
    """Prompt chunks of about one length: running means of their tokens and seconds."""

    tokens: float
    seconds: float


class _ChunkCost:
    """Seconds that a model's prompt chunks add to its steps, by the length of the chunk.

    The cost is not proportional to the length, since a chunk of a few tokens already reads most
    experts of a layer. So it is learnt separately for lengths up to each power of two, with linear
    interpolation in between."""

    _GUESS = 1e-4
    """Seconds per token, before anything is known."""

    def __init__(self) -> None:
        self._lengths: dict[int, _Length] = {}
        self._sorted: list[_Length] = []

    def take(self, tokens: int, seconds: float) -> None:
        expected = self.expected(tokens)
        length = self._lengths.get(tokens.bit_length())
        if length is None:
            length = self._lengths[tokens.bit_length()] = _Length(tokens, seconds)
        else:
            length.tokens += _WEIGHT * (tokens - length.tokens)
            length.seconds += _WEIGHT * (seconds - length.seconds)
        self._sorted = sorted(self._lengths.values(), key=lambda each: each.tokens)
        # If the device has become faster or slower, it has for every length; and no chunk costs
        # less than a shorter one.
        speed = 1 + _WEIGHT * (seconds / expected - 1) if expected else 1.0
        for other in self._sorted:
            if other is not length:
                other.seconds *= speed
                longer = other.tokens > length.tokens
                other.seconds = (max if longer else min)(other.seconds, length.seconds)

    def expected(self, tokens: int) -> float:
        """Expected seconds of a chunk; outside the known lengths, in proportion to the nearest."""
        if not self._sorted:
            return tokens * self._GUESS
        after = bisect_left(self._sorted, float(tokens), key=lambda length: length.tokens)
        if after in (0, len(self._sorted)):
            nearest = self._sorted[max(after - 1, 0)]
            return nearest.seconds * tokens / nearest.tokens
        low, high = self._sorted[after - 1], self._sorted[after]
        share = (tokens - low.tokens) / (high.tokens - low.tokens)
        return low.seconds + share * (high.seconds - low.seconds)

    def fits(self, tokens: int, seconds: float) -> bool:
        """Whether a chunk is known to take no longer than ``seconds``. One that is shorter than any
        before may take as long as the shortest."""
        if not self._sorted:
            return False
        return max(self.expected(tokens), self._sorted[0].seconds) <= seconds


class ChunkBudget(Protocol):
    """Decides for one attention rank how many prompt tokens a step may take."""

    def tokens(self, model: int, generating: Set[int]) -> int:
        """Prompt tokens, at least one, that the next step of ``model`` may take while requests of
        the models ``generating`` wait for their next token."""
        ...

    def share_out(self, flights: Iterable[StepInFlight], now: float) -> None:
        """Time has passed for ``flights``; to be called before one is added or ends."""
        ...

    def landed(self, flight: StepInFlight, steps: int = 1) -> None:
        """``flight`` has ended, with ``steps - 1`` before it under its lease; the time until now
        has been shared out."""
        ...

    def dropped(self, flight: StepInFlight) -> None:
        """``flight`` is to be forgotten: it was taken back, or a rank that it needs was away."""
        ...

    def forget(self, model: int) -> None:
        """The model is gone."""
        ...


class TargetedChunks:
    """Keeps the time between tokens to ``tbt_target_ms``: learns what the rank's steps cost, and
    gives a chunk what the target leaves beside them.

    A step's cost is its model's seconds per step, and what a prompt chunk adds. Steps on several
    lanes share the rank part by part, so the clock shows no step's own time: the time that passes
    is shared out among the steps on the lanes in proportion to their expected costs, and when one
    ends, its model's costs follow the share that it got."""

    def __init__(self, deployment: Deployment) -> None:
        self._lanes = deployment.lanes
        self._page_size = deployment.page_size
        self._most_tokens = deployment.chunked_prefill_size
        self._target = deployment.tbt_target_ms / 1e3
        self._step: dict[int, _Estimate] = defaultdict(lambda: _Estimate(1e-3))
        self._chunk: dict[int, _ChunkCost] = defaultdict(_ChunkCost)
        self._spent: dict[int, float] = {}
        """Seconds that a step in flight has had, by its number."""
        self._seen = 0.0

    def tokens(self, model: int, generating: Set[int]) -> int:
        """What is left of the target beside a step of each model, in whole pages and at least one,
        so that prompts go on under any load; the full chunk without a target. Where models are more
        than lanes, a request that waits for a lane may find a second step on each other lane."""
        if not self._target or not generating:
            return self._most_tokens
        steps = sorted((self._step[m].value for m in generating | {model}), reverse=True)
        again = self._lanes - 1 if len(steps) > self._lanes else 0
        room = self._target - sum(steps) - sum(steps[:again])
        cost, page = self._chunk[model], self._page_size
        most = max(self._most_tokens // page, 1)
        # The first number of pages that does not fit, less one.
        pages = bisect_left(range(1, most + 1), True, key=lambda n: not cost.fits(n * page, room))
        return min(max(pages, 1) * page, self._most_tokens)

    def share_out(self, flights: Iterable[StepInFlight], now: float) -> None:
        at_work = sorted(flights, key=lambda flight: flight.step)[: self._lanes]
        expected = [self._expected(flight) for flight in at_work]
        rate = (now - self._seen) / sum(expected) if any(expected) else 0.0
        for flight, seconds in zip(at_work, expected, strict=True):
            self._spent[flight.step] = self._spent.get(flight.step, 0.0) + seconds * rate
        self._seen = now

    def landed(self, flight: StepInFlight, steps: int = 1) -> None:
        seconds = self._spent.pop(flight.step, 0.0) / steps
        step = self._step[flight.model]
        if not flight.prompt_tokens:
            return step.take(seconds, 1 - (1 - _WEIGHT) ** steps)
        beside = step.value if step.known else 0.0
        self._chunk[flight.model].take(flight.prompt_tokens, max(seconds - beside, 0.0))

    def dropped(self, flight: StepInFlight) -> None:
        self._spent.pop(flight.step, None)

    def forget(self, model: int) -> None:
        self._step.pop(model, None)
        self._chunk.pop(model, None)

    def _expected(self, flight: StepInFlight) -> float:
        step = self._step[flight.model].value
        if not flight.prompt_tokens:
            return step
        return step + self._chunk[flight.model].expected(flight.prompt_tokens)


def chunk_budget(deployment: Deployment) -> ChunkBudget:
    """The budget of one attention rank that ``deployment`` asks for. There is one so far."""
    return TargetedChunks(deployment)
