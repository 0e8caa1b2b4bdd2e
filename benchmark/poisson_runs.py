"""Simulates served runs of some length: Poisson arrivals are drawn and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.kv_model import Charge, KVModel, kv_loads
from crosspool.planner.demand.quantile import QuantileEstimate, check_probability
from crosspool.planner.demand.replay import replay
from crosspool.planner.traffic.samples import Ints, ModelTraffic, Samples, Traffic
from tqdm import tqdm

Start = Literal["stationary", "empty"]
"""State at a run's beginning: that of a random time, or no request at all."""


def poisson_run(
    traffic: Traffic, seconds: float, rng: np.random.Generator, start: Start = "stationary"
) -> Traffic:
    """Draws arrivals over [0, seconds) at the traffic's rates, each with a row of its samples; a
    stationary start adds those that came before 0 and are still there (rows drawn with weight T,
    ages uniform in [0, T), as at any random time)."""
    models = tuple(_model_run(model, seconds, rng, start) for model in traffic.models)
    return Traffic(models, seconds)


def run_quantile_interval(
    traffic: Traffic,
    kv_models: Sequence[KVModel],
    run_seconds: float,
    *,
    quantile: float,
    runs: int,
    level: float,
    seed: int,
    chunk_bytes: int,
    charge: Charge = "active",
    start: Start = "stationary",
    progress: bool | None = None,
) -> QuantileEstimate:
    """Returns the interval in which the quantile over time of pool demand, in bytes, of one more
    run of ``run_seconds`` lies with probability ``level``; its ``value`` is the median of the
    ``runs`` simulated runs.

    It is a distribution-free prediction interval: one more run falls between the l-th and the u-th
    of n runs with a probability of (u - l) / (n + 1), or more where runs can be equal (Meeker, Hahn
    and Escobar, Statistical Intervals, 2nd edition, chapter 5). Demand has no limit here: it is
    what requests hold when none has to wait. Raises ConfigError when ``runs`` are too few."""
    check_probability("quantile", quantile)
    check_probability("level", level)
    kv_loads(traffic, kv_models, chunk_bytes)
    if not (np.isfinite(run_seconds) and run_seconds > 0):
        raise ConfigError(f"run_seconds: {run_seconds}; give more than 0")
    outside = int((runs + 1) * (1 - level) / 2 + 1e-9)
    if outside < 1:
        needed = int(np.ceil(2 / (1 - level) - 1 - 1e-9))
        raise ConfigError(f"runs: {runs} are too few for level {level}; give {needed} or more")
    found = np.empty(runs)
    hidden = None if progress is None else not progress
    streams = np.random.SeedSequence(seed).spawn(runs)
    for i, stream in enumerate(tqdm(streams, desc="simulated runs", leave=False, disable=hidden)):
        run = poisson_run(traffic, run_seconds, np.random.default_rng(stream), start)
        found[i] = replay(run, kv_models, charge, chunk_bytes=chunk_bytes).quantile(quantile).value
    found.sort()
    low, high = float(found[outside - 1]), float(found[runs - outside])
    return QuantileEstimate(quantile, float(np.median(found)), low, high, level)


def _model_run(
    model: ModelTraffic, seconds: float, rng: np.random.Generator, start: Start
) -> ModelTraffic:
    rows = model.samples
    if model.rate == 0:
        nothing = Samples(rows.prompt[:0], rows.output[:0], rows.service[:0])
        return ModelTraffic(model.model, 0.0, nothing, np.empty(0))
    count = int(rng.poisson(model.rate * seconds))
    row: Ints = rng.integers(0, len(rows), count)
    arrivals = rng.uniform(0, seconds, count)
    if start == "stationary":
        often = rng.poisson(model.rate / len(rows) * rows.service)
        there = np.repeat(np.arange(len(rows)), often)
        row = np.concatenate((there, row))
        arrivals = np.concatenate((-rng.random(len(there)) * rows.service[there], arrivals))
    order = np.argsort(arrivals, kind="stable")
    row = row[order]
    drawn = Samples(rows.prompt[row], rows.output[row], rows.service[row])
    return ModelTraffic(model.model, len(row) / seconds, drawn, arrivals[order])
