"""Whether models peak together, and what happens above a budget: questions to a replayed trace.

A model is at its peak while its demand exceeds its own q-quantile over time. Were the models'
demands independent, the number at their peaks at a random time would be the sum of independent
coin tosses with each model's share of time at its peak (Poisson-binomial; Binomial(M, 1 - q) where
every share is 1 - q, but demand comes in whole chunks, and a model that is mostly idle spends less
than that above its quantile), and the pool's demand the convolution of the models'.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from crosspool.planner.demand.compound import convolution
from crosspool.planner.demand.quantile import check_probability
from crosspool.planner.demand.replay import ReplayDemand
from crosspool.planner.demand.timeline import Timeline
from crosspool.planner.traffic.samples import Floats


class Coincidence(msgspec.Struct, frozen=True):
    """How many models are at their peak at the same time."""

    quantile: float
    at_peak: tuple[float, ...]
    """Share of the time per model, at most 1 - quantile."""
    together: tuple[float, ...]
    """Share of the time in which 0, 1, 2, ... models are at their peak."""
    independent: tuple[float, ...]
    """The same, were the models independent."""

    def at_least(self, models: int) -> tuple[float, float]:
        """Share of the time with so many at their peak or more: as it was, and if independent."""
        return sum(self.together[models:]), sum(self.independent[models:])


class Exceedance(msgspec.Struct, frozen=True):
    """The times at which demand exceeds a budget."""

    budget_bytes: float
    fraction: float
    """Share of the time."""
    count: int
    """Intervals without a break."""
    mean_seconds: float
    p99_seconds: float
    longest_seconds: float
    largest_bytes: float
    """The most that demand exceeds the budget by."""


class Quantiles(msgspec.Struct, frozen=True):
    """Pool demand at one quantile, bytes, in three ways."""

    quantile: float
    trace: float
    """As the trace has it."""
    independent: float
    """If each model had its own distribution over time, independent of the others."""
    separate: float
    """The sum of the models' own quantiles."""


class PeakReport(msgspec.Struct, frozen=True):
    seconds: float
    quantiles: tuple[Quantiles, ...]
    coincidence: Coincidence
    exceedance: Exceedance


def peak_report(
    demand: ReplayDemand,
    quantile: float,
    budget_bytes: float,
    quantiles: Sequence[float] = (0.5, 0.9, 0.95, 0.99, 0.999),
) -> PeakReport:
    """Everything below for one trace. ``quantile``: above which a model is at its peak."""
    return PeakReport(
        demand.pool.seconds,
        aggregate(demand, quantiles),
        coincidence(demand.models, quantile),
        exceedance(demand.pool, budget_bytes),
    )


def aggregate(demand: ReplayDemand, quantiles: Sequence[float]) -> tuple[Quantiles, ...]:
    """The distribution of aggregate demand, beside what independence would make of it."""
    chunk = demand.chunk_bytes
    law = np.cumsum(convolution([_law(timeline, chunk) for timeline in demand.models]))
    found = []
    for quantile in quantiles:
        separate = sum(timeline.quantile(quantile) for timeline in demand.models)
        independent = float(np.searchsorted(law, quantile - 1e-12)) * chunk
        found.append(Quantiles(quantile, demand.pool.quantile(quantile), independent, separate))
    return tuple(found)


def coincidence(timelines: Sequence[Timeline], quantile: float) -> Coincidence:
    """``timelines``: demand over time, one per model, all over the same time."""
    check_probability("quantile", quantile)
    above = [timeline.above(timeline.quantile(quantile)) for timeline in timelines]
    seconds = timelines[0].seconds
    begins = np.concatenate([each[:, 0] for each in above])
    ends = np.concatenate([each[:, 1] for each in above])
    change = np.concatenate((np.ones(len(begins)), -np.ones(len(ends))))
    number = Timeline.of_steps(np.concatenate((begins, ends)), change, seconds)
    together = np.bincount(
        number.start.astype(np.int64), weights=np.diff(number.times), minlength=len(timelines) + 1
    )
    shares = [float(np.sum(each[:, 1] - each[:, 0])) / seconds for each in above]
    independent = np.ones(1)
    for share in shares:
        independent = np.convolve(independent, (1 - share, share))
    return Coincidence(
        quantile, tuple(shares), tuple((together / seconds).tolist()), tuple(independent.tolist())
    )


def exceedance(timeline: Timeline, budget_bytes: float) -> Exceedance:
    """How often and how long the timeline is above a budget."""
    above = timeline.above(budget_bytes)
    if len(above) == 0:
        return Exceedance(budget_bytes, 0.0, 0, 0.0, 0.0, 0.0, 0.0)
    lengths = above[:, 1] - above[:, 0]
    return Exceedance(
        budget_bytes,
        float(lengths.sum()) / timeline.seconds,
        len(lengths),
        float(lengths.mean()),
        float(np.quantile(lengths, 0.99, method="inverted_cdf")),
        float(lengths.max()),
        timeline.max - budget_bytes,
    )


def _law(timeline: Timeline, chunk_bytes: int) -> Floats:
    """[k] share of the time at which a step function needs 0, 1, 2, ... chunks."""
    chunks = np.rint(timeline.start / chunk_bytes).astype(np.int64)
    shares = np.diff(timeline.times) / timeline.seconds
    return np.bincount(chunks, weights=shares).astype(np.float64)
