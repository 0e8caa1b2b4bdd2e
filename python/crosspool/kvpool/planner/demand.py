"""Demand on the KV pool at a random time, by Monte Carlo over whole (prompt, output, time) samples.

Stationary: Poisson arrivals of a constant rate. A random time finds Poisson(rate * E[T]) requests
of a model (M/G/infinity, exactly), each a row of the samples drawn with weight T, at an age
uniform in [0, T). So the requests of one row that B independent random times find are
Poisson(B * rate / n * T), scattered uniformly over the B times and over the row's time: that is
how they are drawn here, a row's three values always together. Models with more than ``BUSY``
requests active are drawn from the exact law of their sum instead (compound.py), one draw per time.

Windows: arrivals are Poisson with a rate that is constant within each window of the trace, taken
from its number of arrivals there; the random time is uniform over the whole trace and the same for
all models, so that bursts of several models in one window meet. A request of age u at time t is
kept with probability proportional to the rate at t - u (thinning): exact for those rates. What is
approximate is the rates. Within a window arrivals are Poisson, clumps shorter than a window are
lost; samples are drawn from the whole trace, whatever the window; the system is empty at the start
of the trace; and a window's count is itself a draw of chance, which adds to the variance where
windows hold few arrivals. replay.py has none of these, and no randomness.

Rounding: a request to pages, a model to chunks (its pages lie one after another).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from crosspool.config.deployment import ConfigError
from crosspool.kvpool.planner.compound import chunk_law
from crosspool.kvpool.planner.kv_model import Charge, KVLoad, KVModel, Pages, kv_loads
from crosspool.kvpool.planner.quantile import (
    QuantileEstimate,
    estimate,
    estimate_of_counts,
    scaled,
)
from crosspool.kvpool.planner.traffic import Floats, Ints, Traffic

BUSY = 8.0
"""Active requests, in the mean, above which a model's exact law is cheaper than its requests."""
_CELL_TIMES = 1 << 16
_CELL_REQUESTS = 1 << 19
_STRATA = 64


@dataclass(frozen=True, eq=False)
class DemandSamples:
    """Pool demand at independent random times."""

    chunk_bytes: int
    charge: Charge
    chunks: Ints
    """[samples] chunks of all models together, in no order that means anything."""
    counts: tuple[Ints, ...]
    """Per model [k]: at how many of the times it needed 0, 1, 2, ... chunks."""

    def __len__(self) -> int:
        return len(self.chunks)

    def quantile(self, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Bytes, whole chunks."""
        return scaled(estimate(self.chunks, quantile, level), self.chunk_bytes)

    def model_quantile(self, model: int, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Bytes, whole chunks, of one model."""
        return scaled(estimate_of_counts(self.counts[model], quantile, level), self.chunk_bytes)

    def exceeds(self, nbytes: float) -> float:
        """Share of the times with more than ``nbytes`` in demand."""
        return float(np.mean(self.chunks > nbytes // self.chunk_bytes))

    @property
    def mean(self) -> float:
        """Bytes."""
        return float(self.chunks.mean()) * self.chunk_bytes


@dataclass(frozen=True, eq=False)
class _Source:
    """Where the requests of one model that are active at a random time come from."""

    load: KVLoad
    pages: Pages
    law: Floats | None
    """[k] law of the model's chunks, of a busy model."""
    rates: Floats | None
    """[windows] arrivals per second, where rates change."""
    length: float
    """Seconds of a window."""


@dataclass(frozen=True)
class _Cell:
    """Random times that are drawn together, from one random stream."""

    index: int
    times: int
    stratum: tuple[int, int] | None
    """Windows [first, last) in which the times lie."""


def monte_carlo(
    traffic: Traffic,
    kv_models: Sequence[KVModel],
    samples: int,
    seed: int,
    charge: Charge = "active",
    *,
    chunk_bytes: int,
    window: float | None = None,
    threads: int | None = None,
    progress: bool | None = None,
) -> DemandSamples:
    """Demand at ``samples`` independent random times.

    ``window``: seconds, for rates that change (needs times of arrival); None: stationary.
    ``threads``: by default as many as cores. The result depends on traffic, models, ``samples``
    and ``seed`` alone. ``progress``: None shows a bar when stderr is a terminal.

    Raises ConfigError when traffic and models do not belong together, or times are missing."""
    if samples < 1:
        raise ConfigError(f"samples: {samples}; give 1 or more")
    found = kv_loads(traffic, kv_models, chunk_bytes)
    windows = 0 if window is None else _windows(traffic, window)
    sources = [_source(load, charge, chunk_bytes, traffic.seconds, windows) for load in found]
    cells = _cells(sources, samples, windows, seed)
    chunks = np.empty(samples, dtype=np.int64)
    counts = [np.zeros(1, dtype=np.int64) for _ in sources]
    ends = np.cumsum([cell.times for cell in cells])

    def draw(cell: _Cell) -> list[Ints]:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, cell.index)))
        times = None
        if cell.stratum is not None:
            first, last = cell.stratum
            times = (first + (last - first) * rng.random(cell.times)) * (traffic.seconds / windows)
        total = chunks[ends[cell.index] - cell.times : ends[cell.index]]
        total[:] = 0
        drawn = []
        for source in sources:
            demand = _demand(source, cell, times, chunk_bytes, rng)
            total += demand
            drawn.append(np.bincount(demand))
        return drawn

    with (
        ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool,
        tqdm(
            total=samples,
            desc="demand at random times",
            unit_scale=True,
            leave=False,
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        for cell, drawn in zip(cells, pool.map(draw, cells), strict=True):
            counts = [_sum(old, new) for old, new in zip(counts, drawn, strict=True)]
            bar.update(cell.times)
    return DemandSamples(chunk_bytes, charge, chunks, tuple(counts))


def _windows(traffic: Traffic, window: float) -> int:
    """Number of windows, all of the same length, next to the one asked for."""
    if not 0 < window <= traffic.seconds:
        raise ConfigError(f"window: {window} s; give more than 0, at most {traffic.seconds}")
    if not np.isfinite(traffic.seconds) or any(
        model.arrivals is None and model.rate > 0 for model in traffic.models
    ):
        raise ConfigError("window: the traffic has no times of arrival, only rates")
    return round(traffic.seconds / window)


def _source(
    load: KVLoad, charge: Charge, chunk_bytes: int, seconds: float, windows: int
) -> _Source:
    rates = law = None
    if windows:
        arrivals = np.empty(0) if load.arrivals is None else load.arrivals
        rates = np.histogram(arrivals, windows, (0, seconds))[0] * (windows / seconds)
    elif load.active > BUSY:
        law = chunk_law(load, charge, chunk_bytes)
    return _Source(load, load.pages(charge), law, rates, seconds / windows if windows else 0.0)


def _cells(sources: Sequence[_Source], samples: int, windows: int, seed: int) -> list[_Cell]:
    """Cells small enough for a core's cache, and none of them with times of two strata."""
    most = max((_most_active(s) for s in sources if s.law is None), default=0.0)
    size = int(np.clip(_CELL_REQUESTS / max(most, 1e-9), 64, _CELL_TIMES))
    strata: list[tuple[tuple[int, int] | None, int]] = [(None, samples)]
    if windows:
        edges = np.unique(np.linspace(0, windows, _STRATA + 1).astype(int))
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
        times = rng.multinomial(samples, np.diff(edges) / windows)
        pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        strata = list(zip(pairs, times.tolist(), strict=True))
    cells: list[_Cell] = []
    for stratum, times_in_it in strata:
        for begin in range(0, times_in_it, size):
            cells.append(_Cell(len(cells), min(size, times_in_it - begin), stratum))
    return cells


def _most_active(source: _Source) -> float:
    if source.rates is None:
        return source.load.active
    service = source.load.samples.service
    return float(source.rates.max() * service.mean()) if len(service) else 0.0


def _demand(
    source: _Source, cell: _Cell, times: Floats | None, chunk_bytes: int, rng: np.random.Generator
) -> Ints:
    """[cell.times] chunks of one model."""
    if source.law is not None:
        often = rng.multinomial(cell.times, source.law / source.law.sum())
        return rng.permutation(np.repeat(np.arange(len(often)), often))
    if len(source.load.samples) == 0:
        return np.zeros(cell.times, dtype=np.int64)
    at, pages = (
        _active(source, cell, rng) if times is None else _active_then(source, cell, times, rng)
    )
    held = np.bincount(at, weights=pages, minlength=cell.times).astype(np.int64)
    return source.load.kv.chunks(held, chunk_bytes)


def _active(source: _Source, cell: _Cell, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Active requests: [k] at which of the cell's times, and [k] pages."""
    service = source.load.samples.service
    requests = rng.poisson(source.load.rate * service * (cell.times / len(service)))
    at = rng.integers(0, cell.times, int(requests.sum()))
    pages = rng.random(len(at))
    pages *= np.repeat(source.pages.growth, requests)
    pages += np.repeat(source.pages.first, requests)
    return at, np.ceil(pages, out=pages)


def _active_then(
    source: _Source, cell: _Cell, times: Floats, rng: np.random.Generator
) -> tuple[Ints, Floats]:
    """The same where rates change; ``times``: [cell.times] seconds after the trace's start."""
    assert source.rates is not None and cell.stratum is not None
    service = source.load.samples.service
    bound = _bound(source, cell.stratum)
    requests = rng.poisson(bound * service * (cell.times / len(service)))
    rows = np.repeat(np.arange(len(service)), requests)
    at = rng.integers(0, cell.times, len(rows))
    share = rng.random(len(rows))
    arrived = times[at] - share * service[rows]
    window = np.clip((arrived / source.length).astype(np.int64), 0, len(source.rates) - 1)
    rate = np.where(arrived >= 0, source.rates[window], 0)
    kept = rng.random(len(rows)) * bound[rows] < rate
    rows, share = rows[kept], share[kept]
    return at[kept], np.ceil(source.pages.first[rows] + source.pages.growth[rows] * share)


def _bound(source: _Source, stratum: tuple[int, int]) -> Floats:
    """[n] per sample the highest rate in the windows that reach from its time before the stratum
    to the stratum's end."""
    assert source.rates is not None
    first, last = stratum
    highest = np.maximum.accumulate(
        np.concatenate(([source.rates[first:last].max()], source.rates[:first][::-1]))
    )
    back = np.ceil(source.load.samples.service / source.length).astype(np.int64)
    return highest[np.minimum(back, first)]


def _sum(a: Ints, b: Ints) -> Ints:
    """Counts of both, the shorter one continued with zeros."""
    short, long = sorted((a, b), key=len)
    total = long.copy()
    total[: len(short)] += short
    return total
