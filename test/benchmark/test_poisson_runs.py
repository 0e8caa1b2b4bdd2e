"""Compares simulated runs with fresh ones, and with closed forms in their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.replay import replay
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from scipy.stats import poisson

from benchmark.poisson_runs import Start, poisson_run, run_quantile_interval

FIXED = Samples(np.array([161]), np.array([14]), np.array([4.0]))
"""11 pages of 16 tokens from beginning to end."""
ONE = Traffic((ModelTraffic("m0", 2.5, FIXED),), math.inf)
KV = [KVModel("m0", 1, 16, 10**6)]


def test_a_moment_of_a_stationary_run_is_a_random_time() -> None:
    found = run_quantile_interval(
        ONE, KV, 1e-6, quantile=0.99, runs=2000, level=0.9, seed=0, chunk_bytes=176
    )
    number = poisson(10)
    assert (found.low / 176, found.value / 176) == (number.ppf(0.05), number.ppf(0.5))
    assert found.high / 176 == pytest.approx(number.ppf(0.95), abs=1)


def test_a_run_that_begins_empty_fills_as_requests_come() -> None:
    """Poisson(rate * t) requests run at time t < T; the highest moment of 1 s is its last."""
    found = run_quantile_interval(
        ONE, KV, 1.0, quantile=0.9999, runs=2000, level=0.9, seed=0, chunk_bytes=176, start="empty"
    )
    number = poisson(2.5)
    assert found.value / 176 == number.ppf(0.5)
    assert found.high / 176 == pytest.approx(number.ppf(0.95), abs=1)


def test_a_long_run_measures_the_truth() -> None:
    found = run_quantile_interval(
        ONE, KV, 10_000, quantile=0.89, runs=19, level=0.9, seed=0, chunk_bytes=176
    )
    assert found.low == found.value == found.high == poisson(10).ppf(0.89) * 176


def test_the_stationary_start_holds_ages_and_rows_as_later_times_do() -> None:
    """Demand has its stationary mean at every time of the run, from the first one."""
    rows = Samples(np.array([1000, 10_000]), np.array([3000, 500]), np.array([2.0, 30.0]))
    traffic = Traffic((ModelTraffic("m0", 1.0, rows),), math.inf)
    mean = (2 * 2500 + 30 * 10_250) / 2
    times = np.array([0.0, 1.0, 5.0, 19.9])
    kv = [KVModel("m0", 1, 2, 10**6)]
    seen = np.array(
        [
            replay(
                poisson_run(traffic, 20.0, np.random.default_rng(seed)), kv, chunk_bytes=2
            ).pool.at(times)
            for seed in range(400)
        ]
    )
    error = seen.std(axis=0) / math.sqrt(len(seen))
    assert np.all(np.abs(seen.mean(axis=0) - mean) < 4 * error)


@pytest.mark.parametrize("start", ["stationary", "empty"])
def test_fresh_runs_fall_into_the_interval_at_its_level(start: Start) -> None:
    rng = np.random.default_rng(1)
    rows = Samples(rng.integers(1, 900, 50), rng.integers(1, 900, 50), rng.uniform(1, 20, 50))
    traffic = Traffic((ModelTraffic("m0", 0.5, rows), ModelTraffic("m1", 0.2, FIXED)), math.inf)
    kv = [KVModel("m0", 3, 16, 10**6), KVModel("m1", 2, 16, 10**6)]
    found = run_quantile_interval(
        traffic, kv, 60.0, quantile=0.95, runs=199, level=0.8, seed=0, chunk_bytes=1, start=start
    )
    fresh = [
        replay(
            poisson_run(traffic, 60.0, np.random.default_rng([9, seed]), start), kv, chunk_bytes=1
        )
        .quantile(0.95)
        .value
        for seed in range(200)
    ]
    inside = np.mean([found.low <= value <= found.high for value in fresh])
    error = math.sqrt(0.8 * 0.2 * (1 / 200 + 1 / 200))
    assert inside == pytest.approx(0.8, abs=4 * error)


def test_a_seed_gives_the_same_interval() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        found = run_quantile_interval(
            ONE, KV, 3.0, quantile=0.5, runs=19, level=0.9, seed=seed, chunk_bytes=1
        )
        return found.low, found.value, found.high

    assert draw(3) == draw(3) != draw(4)


def test_too_few_runs_say_how_many_are_needed() -> None:
    with pytest.raises(ConfigError, match="give 39 or more"):
        run_quantile_interval(
            ONE, KV, 1.0, quantile=0.5, runs=38, level=0.95, seed=0, chunk_bytes=1
        )
    with pytest.raises(ConfigError, match="run_seconds"):
        run_quantile_interval(ONE, KV, 0.0, quantile=0.5, runs=39, level=0.9, seed=0, chunk_bytes=1)
