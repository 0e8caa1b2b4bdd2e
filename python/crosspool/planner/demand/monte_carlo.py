"""Demand on the KV pool at a random time, by Monte Carlo over whole (prompt, output, time) samples.

Stationary traffic has Poisson arrivals at a constant rate. A random time finds
Poisson(rate * E[T]) requests of a model (M/G/infinity, exactly), each a row of the samples drawn
with weight T, at an age uniform in [0, T). So the number of requests of one row that B independent
random times find is Poisson(B * rate / n * T), spread uniformly over the B times and over the row's
time. They are drawn in this way, with a row's three values always together. A model with more than
``BUSY`` active requests is drawn from the exact law of their sum instead (compound.py), once per
random time.

With windows, the random time lies in a trace whose requests keep to their windows (windows.py).

A request is rounded up to pages, and a model to chunks, as its pages lie one after another.
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
"""Mean number of active requests above which a model's exact law is cheaper than its requests."""
_CELL_TIMES = 1 << 16
_CELL_REQUESTS = 1 << 19


@dataclass(frozen=True, eq=False)
class DemandSamples:
    """Pool demand at independent random times."""

    chunk_bytes: int
    charge: Charge
    chunks: Ints
    """[samples] chunks of all models together; their order has no meaning."""
    counts: tuple[Ints, ...]
    """Per model, [k] number of times at which it needed 0, 1, 2, ... chunks."""

    def __len__(self) -> int:
        return len(self.chunks)

    def quantile(self, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Quantile of the pool's demand, in bytes of whole chunks."""
        return scaled(estimate(self.chunks, quantile, level), self.chunk_bytes)

    def model_quantile(self, model: int, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Quantile of one model's demand, in bytes of whole chunks."""
        return scaled(estimate_of_counts(self.counts[model], quantile, level), self.chunk_bytes)

    def exceeds(self, nbytes: float) -> float:
        """Share of the times at which demand exceeds ``nbytes``."""
        return float(np.mean(self.chunks > nbytes // self.chunk_bytes))

    @property
    def mean(self) -> float:
        """Mean demand, in bytes."""
        return float(self.chunks.mean()) * self.chunk_bytes


@dataclass(frozen=True, eq=False)
class _Source:
    """Source of one model's requests that are active at a random time."""

    load: KVLoad
    pages: Pages
    law: Floats | None
    """[k] law of a busy model's chunks; None for other models."""
    windowed: WindowedRequests | None
    """The model's requests by windows; None for stationary traffic."""

    @property
    def most(self) -> float:
        """Mean number of requests to draw per random time."""
        if self.windowed is not None:
            return self.windowed.most
        return self.load.active if self.law is None else 0.0


@dataclass(frozen=True)
class _Cell:
    """Random times that are drawn together, from one random stream."""

    index: int
    times: int
    stratum: int
    """Stratum of windows that the times lie in; 0 without windows."""


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
    """Draws demand at ``samples`` independent random times.

    ``window`` is the time in seconds for which rates count as constant, and needs arrival times;
    None takes the traffic as stationary. ``threads`` are as many as cores by default; the result
    depends on traffic, models, ``samples``, ``seed`` and ``window`` alone. A ``progress`` of None
    shows a bar when stderr is a terminal.

    Raises ConfigError when traffic and models do not belong together, or arrival times are
    missing."""
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
    """Splits the times into cells that fit a core's cache, each within one stratum."""
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
    """Draws [cell.times] chunks of one model."""
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
    """Draws active requests: [k] indices of the cell's times, and [k] pages."""
    service = source.load.samples.service
    requests = rng.poisson(source.load.rate * service * (cell.times / len(service)))
    at = rng.integers(0, cell.times, int(requests.sum()))
    pages = rng.random(len(at))
    pages *= np.repeat(source.pages.growth, requests)
    pages += np.repeat(source.pages.first, requests)
    return at, np.ceil(pages, out=pages)


def _sum(a: Ints, b: Ints) -> Ints:
    """Adds counts of different lengths."""
    short, long = sorted((a, b), key=len)
    total = long.copy()
    total[: len(short)] += short
    return total
