"""Demand on the KV pool at a random time, by Monte Carlo over whole (prompt, output, time) samples.

Stationary: Poisson arrivals of a constant rate. A random time finds Poisson(rate * E[T]) requests
of a model (M/G/infinity, exactly), each a row of the samples drawn with weight T, at an age
uniform in [0, T). So the requests of one row that B independent random times find are
Poisson(B * rate / n * T), scattered uniformly over the B times and over the row's time: that is
how they are drawn here, a row's three values always together. Models with more than ``BUSY``
requests active are drawn from the exact law of their sum instead (compound.py), one draw per time.

Windows: the random time is one of a trace's, whose requests keep to their windows (windows.py).

Rounding: a request to pages, a model to chunks (its pages lie one after another).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from crosspool.config.errors import ConfigError
from crosspool.planner.demand.compound import chunk_law
from crosspool.planner.demand.kv_model import Charge, KVLoad, KVModel, Pages, kv_loads
from crosspool.planner.demand.quantile import (
    QuantileEstimate,
    estimate,
    estimate_of_counts,
    scaled,
)
from crosspool.planner.demand.windows import WindowedRequests, Windows, windows_of
from crosspool.planner.traffic.samples import Floats, Ints, Traffic

BUSY = 8.0
"""Active requests, in the mean, above which a model's exact law is cheaper than its requests."""
_CELL_TIMES = 1 << 16
_CELL_REQUESTS = 1 << 19


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
    windowed: WindowedRequests | None
    """Its requests by windows."""

    @property
    def most(self) -> float:
        """Requests to draw per random time."""
        if self.windowed is not None:
            return self.windowed.most
        return self.load.active if self.law is None else 0.0


@dataclass(frozen=True)
class _Cell:
    """Random times that are drawn together, from one random stream."""

    index: int
    times: int
    stratum: int
    """Of the windows; 0 without windows."""


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
    windows = None if window is None else windows_of(traffic, window)
    sources = [_source(load, charge, windows) for load in found]
    cells = _cells(sources, samples, windows, seed)
    chunks = np.empty(samples, dtype=np.int64)
    counts = [np.zeros(1, dtype=np.int64) for _ in sources]
    ends = np.cumsum([cell.times for cell in cells])

    def draw(cell: _Cell) -> list[Ints]:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, cell.index)))
        times = None if windows is None else windows.times(cell.stratum, cell.times, rng)
        total = chunks[ends[cell.index] - cell.times : ends[cell.index]]
        total[:] = 0
        drawn = []
        for source in sources:
            demand = _demand(source, cell, times, rng)
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


def _source(load: KVLoad, charge: Charge, windows: Windows | None) -> _Source:
    pages = load.pages(charge)
    if windows is not None:
        return _Source(load, pages, None, WindowedRequests.of(load, pages, windows))
    law = chunk_law(load, charge) if load.active > BUSY else None
    return _Source(load, pages, law, None)


def _cells(
    sources: Sequence[_Source], samples: int, windows: Windows | None, seed: int
) -> list[_Cell]:
    """Cells small enough for a core's cache, and none of them with times of two strata."""
    most = max((source.most for source in sources), default=0.0)
    size = int(np.clip(_CELL_REQUESTS / max(most, 1e-9), 64, _CELL_TIMES))
    strata = [samples]
    if windows is not None:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
        strata = rng.multinomial(samples, windows.share()).tolist()
    cells: list[_Cell] = []
    for stratum, times in enumerate(strata):
        for begin in range(0, times, size):
            cells.append(_Cell(len(cells), min(size, times - begin), stratum))
    return cells


def _demand(source: _Source, cell: _Cell, times: Floats | None, rng: np.random.Generator) -> Ints:
    """[cell.times] chunks of one model."""
    if source.law is not None:
        often = rng.multinomial(cell.times, source.law / source.law.sum())
        return rng.permutation(np.repeat(np.arange(len(often)), often))
    if len(source.load.samples) == 0:
        return np.zeros(cell.times, dtype=np.int64)
    if source.windowed is not None and times is not None:
        at, pages = source.windowed.active(cell.stratum, times, rng)
    else:
        at, pages = _active(source, cell, rng)
    held = np.bincount(at, weights=pages, minlength=cell.times).astype(np.int64)
    return source.load.layout.chunks_for(held)


def _active(source: _Source, cell: _Cell, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Active requests: [k] at which of the cell's times, and [k] pages."""
    service = source.load.samples.service
    requests = rng.poisson(source.load.rate * service * (cell.times / len(service)))
    at = rng.integers(0, cell.times, int(requests.sum()))
    pages = rng.random(len(at))
    pages *= np.repeat(source.pages.growth, requests)
    pages += np.repeat(source.pages.first, requests)
    return at, np.ceil(pages, out=pages)


def _sum(a: Ints, b: Ints) -> Ints:
    """Counts of both, the shorter one continued with zeros."""
    short, long = sorted((a, b), key=len)
    total = long.copy()
    total[: len(short)] += short
    return total
