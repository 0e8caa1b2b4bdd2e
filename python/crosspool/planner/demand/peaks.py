"""Reports from a replayed trace whether models peak together, and how demand exceeds a budget.

A model is at its peak while its demand exceeds its own q-quantile over time. If the models' demands
were independent, the number of models at their peak at a random time would be a sum of independent
coin tosses, one per model with its share of time at its peak (Poisson-binomial). The share is at
most 1 - q; it is less for a model that is mostly idle, because demand comes in whole chunks. The
law of the pool's demand would be the convolution of the models' laws.
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
    """Statistics of the number of models that are at their peak at the same time."""

    quantile: float
    at_peak: tuple[float, ...]
    """Per model: share of the time at its peak, at most 1 - quantile."""
    together: tuple[float, ...]
    """Shares of the time in which 0, 1, 2, ... models are at their peak."""
    independent: tuple[float, ...]
    """Shares of the time that would be expected of independent models."""

    def at_least(self, models: int) -> tuple[float, float]:
        """Share of the time with at least so many at their peak: measured, and if independent."""
        return sum(self.together[models:]), sum(self.independent[models:])


class Exceedance(msgspec.Struct, frozen=True):
    """Statistics of the times at which demand exceeds a budget."""

    budget_bytes: float
    fraction: float
    """Share of the time at which demand exceeds the budget."""
    count: int
    """Number of intervals in which it does so without a break."""
    mean_seconds: float
    p99_seconds: float
    longest_seconds: float
    largest_bytes: float
    """Largest number of bytes by which demand exceeds the budget."""


class Quantiles(msgspec.Struct, frozen=True):
    """Pool demand at one quantile, in bytes, computed in three ways."""

    quantile: float
    trace: float
    """The trace's own quantile."""
    independent: float
    """The quantile if the models kept their own distributions but were independent."""
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
    """Makes the whole report of one trace. A model is at its peak above its ``quantile``."""
    return PeakReport(
        demand.pool.seconds,
        aggregate(demand, quantiles),
        coincidence(demand.models, quantile),
        exceedance(demand.pool, budget_bytes),
    )


def aggregate(demand: ReplayDemand, quantiles: Sequence[float]) -> tuple[Quantiles, ...]:
    """Returns quantiles of the pool's demand, beside those of independent models."""
    chunk = demand.chunk_bytes
    law = np.cumsum(convolution([_law(timeline, chunk) for timeline in demand.models]))
    found = []
    for quantile in quantiles:
        separate = sum(timeline.quantile(quantile) for timeline in demand.models)
        independent = float(np.searchsorted(law, quantile - 1e-12)) * chunk
        found.append(Quantiles(quantile, demand.pool.quantile(quantile), independent, separate))
    return tuple(found)


def coincidence(timelines: Sequence[Timeline], quantile: float) -> Coincidence:
    """Counts the models at their peak. ``timelines`` are the models' demands over the same time."""
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
    """Measures how often and for how long demand exceeds a budget."""
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
    """Returns [k] shares of the time at which a step function needs 0, 1, 2, ... chunks."""
    chunks = np.rint(timeline.start / chunk_bytes).astype(np.int64)
    shares = np.diff(timeline.times) / timeline.seconds
    return np.bincount(chunks, weights=shares).astype(np.float64)
