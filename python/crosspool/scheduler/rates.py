"""How fast one model generates now, and how much of its prompts the prefix cache has of late."""

from __future__ import annotations

from collections import deque

THROUGHPUT_SECONDS = 10.0
"""Time over which the tokens per second are counted."""
HIT_RATE_SECONDS = 60.0
"""Time over which prompts are counted for the cache's hit rate."""
_PARTS = 20


class RecentSum:
    """The sum of what was added within the last ``seconds`` of a clock, to a twentieth of that
    time. It holds 21 numbers at most, however often something is added."""

    def __init__(self, seconds: float) -> None:
        self._part = seconds / _PARTS
        self._sums: deque[tuple[int, int]] = deque()
        """Pairs (number of the part of time, sum of what was added within it), oldest first."""

    def add(self, amount: int, now: float) -> None:
        """Adds ``amount`` at clock time ``now``, which never goes back."""
        part = int(now / self._part)
        if self._sums and self._sums[-1][0] == part:  # as nearly always, and for each token
            self._sums[-1] = part, self._sums[-1][1] + amount
        else:
            self._expire(now)
            self._sums.append((part, amount))

    def total(self, now: float) -> int:
        self._expire(now)
        return sum(amount for _, amount in self._sums)

    def _expire(self, now: float) -> int:
        part = int(now / self._part)
        while self._sums and self._sums[0][0] <= part - _PARTS:
            self._sums.popleft()
        return part


class ModelRates:
    """Times are in seconds of one clock that only grows."""

    def __init__(self) -> None:
        self._generated = RecentSum(THROUGHPUT_SECONDS)
        self._prompts = RecentSum(HIT_RATE_SECONDS)
        self._cached = RecentSum(HIT_RATE_SECONDS)

    def generated(self, now: float, tokens: int = 1) -> None:
        """Tokens were sampled."""
        self._generated.add(tokens, now)

    def admitted(self, prompt_tokens: int, cached_tokens: int, now: float) -> None:
        """A request was admitted, whose prompt has ``cached_tokens`` in the prefix cache."""
        self._prompts.add(prompt_tokens, now)
        self._cached.add(cached_tokens, now)

    def tokens_per_second(self, now: float) -> float:
        return self._generated.total(now) / THROUGHPUT_SECONDS

    def cache_hit_rate(self, now: float) -> float:
        """Share of prompt tokens, from 0 to 1, that were cached; 0 where nothing was admitted."""
        prompts = self._prompts.total(now)
        return self._cached.total(now) / prompts if prompts else 0.0
