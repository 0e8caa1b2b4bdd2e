"""Random times in a trace whose requests keep to their windows, but not to their times in them.

Every request of the trace stands for Poisson(1) requests that arrive uniformly within its window.
So a window has Poisson arrivals at the trace's rate in that window, with the trace's lengths there.
The random time is uniform over the whole trace and the same for all models, so that bursts of
several models in one window meet. A request of window [w, w + d) is active at time t with age u
at intensity du / d where u < T and w <= t - u < w + d, which is drawn exactly.

Two things are approximate. Arrivals within a window are Poisson, so clumps shorter than a window
are lost. And where windows hold few requests, the trace's own chance is drawn a second time, which
adds variance: in very short windows, that of Poisson(1) copies of every request. The system is
empty at the trace's start. replay.py needs no windows and has no randomness.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.demand.kv_model import KVLoad, Pages
from crosspool.planner.traffic.samples import Floats, Ints, Traffic

_STRATA = 128


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of equal length over a trace, grouped into strata whose times are drawn together."""

    length: float
    """Seconds of a window."""
    edges: Ints
    """[strata + 1] index of each stratum's first window, and the number of windows."""

    def times(self, stratum: int, count: int, rng: np.random.Generator) -> Floats:
        """Draws [count] times in seconds, uniform over the stratum."""
        first, last = self.edges[stratum : stratum + 2].tolist()
        times: np.ndarray = (first + (last - first) * rng.random(count)) * self.length
        return times

    def share(self) -> Floats:
        """Returns [strata] shares of the whole time."""
        shares: np.ndarray = np.diff(self.edges) / self.edges[-1]
        return shares


def windows_of(traffic: Traffic, seconds: float) -> Windows:
    """Returns windows of about ``seconds``, a whole number of which cover the traffic's time.
    Raises ConfigError when the traffic has rates only."""
    if not 0 < seconds <= traffic.seconds:
        raise ConfigError(
            f"window: {seconds} s; give more than 0 s and at most {traffic.seconds} s"
        )
    if not np.isfinite(traffic.seconds) or any(
        model.arrivals is None and model.rate > 0 for model in traffic.models
    ):
        raise ConfigError("window: the traffic has no arrival times, only rates")
    count = round(traffic.seconds / seconds)
    edges = np.unique(np.linspace(0, count, min(count, _STRATA) + 1).astype(np.int64))
    return Windows(traffic.seconds / count, edges)


@dataclass(frozen=True, eq=False)
class WindowedRequests:
    """One model's requests, grouped by the strata in which they may be active."""

    length: float
    begin: Floats
    """[n] beginning of each request's window, in seconds."""
    service: Floats
    pages: Pages
    rows: tuple[Ints, ...]
    """Per stratum, indices of the requests that may be active in it."""

    @classmethod
    def of(cls, load: KVLoad, pages: Pages, windows: Windows) -> WindowedRequests:
        arrivals = np.empty(0) if load.arrivals is None else load.arrivals
        window = np.clip((arrivals / windows.length).astype(np.int64), 0, windows.edges[-1] - 1)
        begin = window * np.float64(windows.length)
        service = load.samples.service
        end = begin + windows.length + service
        edges = windows.edges * windows.length
        rows = tuple(
            np.flatnonzero((begin < last) & (end > first))
            for first, last in itertools.pairwise(edges.tolist())
        )
        return cls(windows.length, begin, service, pages, rows)

    @property
    def most(self) -> float:
        """Mean number of requests to draw per random time in the busiest stratum."""
        often = np.minimum(self.service / self.length, 1)
        return max((float(often[rows].sum()) for rows in self.rows), default=0.0)

    def active(self, stratum: int, times: Floats, rng: np.random.Generator) -> tuple[Ints, Floats]:
        """Draws active requests at ``times``, [k] seconds in the stratum: returns [j] indices of
        the times, and [j] pages."""
        rows = self.rows[stratum]
        reach = np.minimum(self.service[rows], self.length)
        rows = np.repeat(rows, rng.poisson(reach * (len(times) / self.length)))
        at = rng.integers(0, len(times), len(rows))
        begin, service = self.begin[rows], self.service[rows]
        since = times[at] - begin
        # Requests shorter than a window are thrown by age, and kept if they then came in it;
        # longer ones by arrival in the window, and kept if they are still there.
        thrown = rng.random(len(rows)) * np.minimum(service, self.length)
        age = np.where(service <= self.length, thrown, since - thrown)
        kept = (age >= 0) & (age < service) & (age <= since) & (age > since - self.length)
        rows = rows[kept]
        share = age[kept] / service[kept]
        return at[kept], np.ceil(self.pages.first[rows] + self.pages.growth[rows] * share)
