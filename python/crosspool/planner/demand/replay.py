"""The exact demand of a trace with arrival times, at every moment and without randomness.

Request i of a model arrives at A_i and holds the whole pages of Q_i(t - A_i), so the model's pages
change at arrivals, whenever a request's tokens pass a page's end, and at departures. The model's
chunks follow, and the pool's are their sum. Quantiles and shares are over the time between the
trace's start and its end: the system is empty at the start, and requests that stay beyond the end
are cut off there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from crosspool.config.errors import ConfigError
from crosspool.planner.demand.kv_model import Charge, KVLoad, KVModel, kv_loads
from crosspool.planner.demand.quantile import QuantileEstimate
from crosspool.planner.demand.timeline import Timeline, total
from crosspool.planner.traffic.samples import Floats, Traffic


@dataclass(frozen=True, eq=False)
class ReplayDemand:
    """Demand of a trace over its time, in bytes, whole chunks."""

    chunk_bytes: int
    charge: Charge
    pool: Timeline
    models: tuple[Timeline, ...]

    def quantile(self, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Bytes that are enough for this share of the time. They are exact, whatever ``level``."""
        return QuantileEstimate.exact(quantile, self.pool.quantile(quantile))

    def model_quantile(self, model: int, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Bytes that are enough for one model for this share of the time."""
        return QuantileEstimate.exact(quantile, self.models[model].quantile(quantile))

    def exceeds(self, nbytes: float) -> float:
        """Share of the time at which demand exceeds ``nbytes``."""
        return self.pool.fraction_above(nbytes)

    @property
    def mean(self) -> float:
        """Mean demand, in bytes."""
        return self.pool.mean


def replay(
    traffic: Traffic,
    kv_models: Sequence[KVModel],
    charge: Charge = "active",
    *,
    chunk_bytes: int,
    progress: bool | None = False,
) -> ReplayDemand:
    """Computes the trace's demand over [0, traffic.seconds). Raises ConfigError when traffic and
    models do not belong together, or arrival times are missing."""
    found = _timed_loads(traffic, kv_models, chunk_bytes)
    hidden = None if progress is None else not progress
    timelines = tuple(
        _model_timeline(load, charge, traffic.seconds)
        for load in tqdm(found, desc="replay", unit="model", leave=False, disable=hidden)
    )
    return ReplayDemand(chunk_bytes, charge, total(timelines), timelines)


def _timed_loads(
    traffic: Traffic, kv_models: Sequence[KVModel], chunk_bytes: int
) -> tuple[KVLoad, ...]:
    """Pairs traffic and models. Raises ConfigError when requests have no arrival times."""
    found = kv_loads(traffic, kv_models, chunk_bytes)
    for load in found:
        if load.arrivals is None and load.rate > 0:
            raise ConfigError(
                f"arrivals of {load.kv.name}: the traffic has only its rate, no times"
            )
    if not (np.isfinite(traffic.seconds) and traffic.seconds > 0):
        raise ConfigError(f"seconds: traffic over {traffic.seconds} s cannot be replayed")
    return found


def _model_timeline(load: KVLoad, charge: Charge, seconds: float) -> Timeline:
    if load.arrivals is None:
        return Timeline.of_steps(np.empty(0), np.empty(0), seconds)
    at, pages = _page_changes(load, charge)
    held = Timeline.of_steps(at, pages, seconds)
    chunks = load.layout.chunks_for(held.start.astype(np.int64))
    held_bytes = chunks * float(load.layout.chunk_bytes)
    return Timeline.of_steps(held.times[:-1], np.diff(held_bytes, prepend=0.0), seconds).merged()


def _page_changes(load: KVLoad, charge: Charge) -> tuple[Floats, Floats]:
    """Returns the times at which the model's pages change, and the changes.

    A request starts with the pages of its recurrent state and prompt // page_size + 1 others, as
    its first output token is on its way, and takes the next page when Q(u) passes a page's end.
    Promised pages are all there at once."""
    assert load.arrivals is not None
    pages, service = load.pages(charge), load.samples.service
    leave = load.arrivals + service
    if charge == "promised":
        return np.concatenate((load.arrivals, leave)), np.concatenate((pages.first, -pages.first))
    prompt, output, size = load.samples.prompt, load.samples.output, load.kv.page_size
    begin = load.layout.state_pages + prompt // size + 1
    last = load.layout.pages_for(prompt + output)
    more = last - begin
    row = np.repeat(np.arange(len(more)), more)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(more) - more, more)
    share = (begin[row] + nth - pages.first[row]) / pages.growth[row]
    return (
        np.concatenate((load.arrivals, load.arrivals[row] + share * service[row], leave)),
        np.concatenate((begin, np.ones(len(row)), -last)),
    )
