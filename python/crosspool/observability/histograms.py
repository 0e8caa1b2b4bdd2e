"""Histograms of what requests took: the scheduler fills them, metrics and ``crosspool top`` show
them."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

SECONDS = (
    *(0.0005, 0.0007),
    *(float(f"{step}e{power}") for power in range(-3, 2) for step in (1, 2, 3, 5, 7)),
    *(100.0, 200.0, 300.0, 600.0),
)
"""Upper bounds of the buckets of times: from half a millisecond to ten minutes."""
TOKENS = tuple(float(1 << power) for power in range(19))
"""Upper bounds of the buckets of lengths: from one token to 262,144."""


class Histogram(msgspec.Struct, kw_only=True):
    """How many values lie in each bucket. A value that equals a bound lies below it."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, ascending."""
    counts: list[int]
    """Number of values in each bucket; the last one is of those above all bounds."""
    sum: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Histogram:
        """An empty histogram with these buckets."""
        return cls(bounds=bounds, counts=[0] * (len(bounds) + 1))

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def since(self, earlier: Histogram | None) -> Histogram:
        """What has been observed since ``earlier``, an older state of this histogram. Where that is
        none, as after a restart, it is everything."""
        if earlier is None or earlier.bounds != self.bounds:
            return self
        counts = [now - then for now, then in zip(self.counts, earlier.counts, strict=True)]
        if min(counts) < 0:
            return self
        return Histogram(bounds=self.bounds, counts=counts, sum=self.sum - earlier.sum)

    def plus(self, other: Histogram) -> Histogram:
        """The values of both, which have the same buckets."""
        counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        return Histogram(bounds=self.bounds, counts=counts, sum=self.sum + other.sum)

    def quantile(self, share: float) -> float | None:
        """The value below which ``share`` of the values lie, from 0 to 1, as Prometheus'
        ``histogram_quantile`` estimates it: values are taken to lie evenly within their bucket, and
        those above all bounds at the last bound. None where there are no values."""
        rank = share * self.count
        if not self.count:
            return None
        below = 0
        for bucket, count in enumerate(self.counts[:-1]):
            if count and below + count >= rank:
                low = self.bounds[bucket - 1] if bucket else 0.0
                return low + (self.bounds[bucket] - low) * (rank - below) / count
            below += count
        return self.bounds[-1]


def _seconds() -> Histogram:
    return Histogram.of(SECONDS)


def _tokens() -> Histogram:
    return Histogram.of(TOKENS)


class ModelHistograms(msgspec.Struct, kw_only=True):
    """What one model's requests took since the scheduler's start. Times are the scheduler's: they
    begin when a request has come to it, tokenized. Health checks and requests that an earlier
    scheduler had taken are left out."""

    model: int = -1
    """The model's number."""
    name: str = ""
    queue_seconds: Histogram = msgspec.field(default_factory=_seconds)
    """Time until the request was admitted for the first time."""
    first_token_seconds: Histogram = msgspec.field(default_factory=_seconds)
    """Time until the first token was sampled."""
    between_tokens_seconds: Histogram = msgspec.field(default_factory=_seconds)
    """Time from each token of a request to its next one."""
    end_to_end_seconds: Histogram = msgspec.field(default_factory=_seconds)
    """Time until the end of requests that ended by themselves."""
    prompt_tokens: Histogram = msgspec.field(default_factory=_tokens)
    """Lengths of their prompts."""
    output_tokens: Histogram = msgspec.field(default_factory=_tokens)
    """Lengths of their outputs."""
