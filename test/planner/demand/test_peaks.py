"""Compares peaks with counts by hand, with independence, and with sums on a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.peaks import aggregate, coincidence, exceedance, peak_report
from crosspool.planner.demand.replay import ReplayDemand, replay
from crosspool.planner.demand.timeline import Timeline, total
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from scipy.stats import binom

from benchmark.azure_pool import dispersion
from benchmark.poisson_runs import poisson_run


def steps(*pieces: tuple[float, float]) -> Timeline:
    """Makes a step function from pairs of seconds and bytes."""
    seconds, values = np.array(pieces, dtype=float).T
    return Timeline(np.append(0, np.cumsum(seconds)), values, values)


def test_peaks_by_hand() -> None:
    """Three models over 10 s, at their peaks in [0, 1), in [0, 1), and in [8, 9)."""
    early, late = steps((1, 9), (9, 2)), steps((8, 0), (1, 5), (1, 0))
    found = coincidence([early, early, late], 0.9)
    assert found.at_peak == pytest.approx((0.1, 0.1, 0.1))
    assert found.together == pytest.approx((0.8, 0.1, 0.1, 0))
    assert found.independent == pytest.approx(binom.pmf(range(4), 3, 0.1))
    assert found.at_least(2) == pytest.approx((0.1, binom.sf(1, 3, 0.1)))


def test_dispersion_is_one_for_chance_and_the_number_of_models_for_lockstep() -> None:
    path = steps((1, 9), (9, 2))
    assert dispersion(coincidence([path] * 7, 0.9)) == pytest.approx(7)
    rng = np.random.default_rng(0)
    rows = Samples(rng.integers(1, 3000, 500), rng.integers(1, 900, 500), rng.uniform(1, 20, 500))
    traffic = Traffic(tuple(ModelTraffic(f"m{i}", 0.3, rows) for i in range(10)), math.inf)
    kv = [KVModel(f"m{i}", 3, 16, 10**6) for i in range(10)]
    demand = replay(poisson_run(traffic, 6000.0, rng), kv, chunk_bytes=48)
    found = coincidence(demand.models, 0.9)
    assert found.at_peak == pytest.approx([0.1] * 10, abs=5e-3)
    assert dispersion(found) == pytest.approx(1, abs=0.25)
    assert found.together == pytest.approx(binom.pmf(range(11), 10, 0.1), abs=0.02)
    for row in aggregate(demand, (0.5, 0.9, 0.99)):
        assert row.trace == pytest.approx(row.independent, rel=0.05)
    assert row.separate > 1.3 * row.trace


def test_aggregate_by_hand() -> None:
    """Two models in lockstep: 0 for 9 s, 10 for 1 s. Independent, 20 has 1 % of the time."""
    path = steps((9, 0), (1, 10))
    demand = ReplayDemand(10, "active", total([path, path]), (path, path))
    found = {row.quantile: row for row in aggregate(demand, (0.8, 0.85, 0.95, 0.995))}
    assert [found[q].trace for q in found] == [0, 0, 20, 20]
    assert [found[q].independent for q in found] == [0, 10, 10, 20]
    assert [found[q].separate for q in found] == [0, 0, 20, 20]


def test_exceedance_by_hand() -> None:
    found = exceedance(steps((1, 5), (2, 7), (1, 9), (2, 6), (1, 8), (3, 0)), 6)
    assert found.fraction == pytest.approx(0.4)
    assert (found.count, found.mean_seconds, found.longest_seconds) == (2, 2.0, 3.0)
    assert (found.p99_seconds, found.largest_bytes) == (3.0, 3)
    assert exceedance(steps((10, 5)), 5).count == 0


def test_a_report_adds_up() -> None:
    rng = np.random.default_rng(0)
    rows = Samples(rng.integers(1, 300, 60), rng.integers(1, 400, 60), rng.uniform(1, 20, 60))
    models = tuple(
        ModelTraffic(f"m{i}", 0.6, rows, np.sort(rng.uniform(0, 100, 60))) for i in range(4)
    )
    kv = [KVModel(f"m{i}", 3, 16, 5000) for i in range(4)]
    demand = replay(Traffic(models, 100.0), kv, chunk_bytes=200)
    budget = demand.quantile(0.9).value
    report = peak_report(demand, 0.95, budget)
    assert sum(report.coincidence.together) == pytest.approx(1)
    assert sum(report.coincidence.independent) == pytest.approx(1)
    mean = sum(k * share for k, share in enumerate(report.coincidence.together))
    assert mean == pytest.approx(sum(report.coincidence.at_peak))
    assert max(report.coincidence.at_peak) <= 0.05 + 1e-9
    assert report.exceedance.fraction == pytest.approx(demand.exceeds(budget))
    assert report.exceedance.fraction <= 0.1 + 1e-9
