"""Compares replays with sums over requests on a fine grid, and timelines with integrals by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.compound import exact_demand
from crosspool.planner.demand.kv_model import Charge, KVModel
from crosspool.planner.demand.replay import ReplayDemand, replay
from crosspool.planner.demand.timeline import Timeline, total
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from support.replayed import GRID, MODELS, SECONDS, TRAFFIC, formula_timeline, model

from benchmark.shifted_replays import rotated

_STATE_PAGES = 3
RECURRENT = tuple(replace(kv, state_bytes=100, state_row=20) for kv in MODELS)
"""Models with recurrent state: five rows, two to a page of either model."""


def by_hand(kv: KVModel, traffic: ModelTraffic, charge: Charge, chunk_bytes: int) -> np.ndarray:
    """Sums the model's bytes at every time of the grid, request by request."""
    pages = np.zeros(len(GRID))
    assert traffic.arrivals is not None
    for prompt, output, service, arrival in zip(
        traffic.samples.prompt,
        traffic.samples.output,
        traffic.samples.service,
        traffic.arrivals,
        strict=True,
    ):
        age = GRID - arrival
        tokens = prompt + (output * age / service if charge == "active" else output)
        held = np.ceil(tokens / kv.page_size) + (_STATE_PAGES if kv.state_bytes else 0)
        pages += np.where((age >= 0) & (age < service), held, 0)
    return np.ceil(pages * kv.page_bytes / chunk_bytes) * chunk_bytes


@pytest.mark.parametrize("models", [MODELS, RECURRENT], ids=["KV", "KV and state"])
@pytest.mark.parametrize("charge", ["active", "promised"])
def test_replay_is_the_sum_over_requests(charge: Charge, models: Sequence[KVModel]) -> None:
    demand = replay(TRAFFIC, models, charge, chunk_bytes=200)
    pool = np.zeros(len(GRID))
    for kv, traffic, path in zip(models, TRAFFIC.models, demand.models, strict=True):
        values = by_hand(kv, traffic, charge, 200)
        assert np.array_equal(path.at(GRID), values)
        pool += values
    assert np.array_equal(demand.pool.at(GRID), pool)
    assert demand.pool.max == pool.max()
    assert demand.mean == pytest.approx(pool.mean(), rel=1e-4)
    for quantile in (0.1, 0.5, 0.9, 0.99):
        assert demand.quantile(quantile).value == pytest.approx(
            np.quantile(pool, quantile), abs=200
        )
    assert demand.exceeds(12_000) == pytest.approx(np.mean(pool > 12_000), abs=1e-4)


def test_the_formula_is_the_replay_without_rounding() -> None:
    path = formula_timeline(TRAFFIC, MODELS)
    expected = np.zeros(len(GRID))
    for kv, traffic in zip(MODELS, TRAFFIC.models, strict=True):
        rows = traffic.samples
        assert traffic.arrivals is not None
        for prompt, output, service, arrival in zip(
            rows.prompt, rows.output, rows.service, traffic.arrivals, strict=True
        ):
            age = GRID - arrival
            held = kv.kv_bytes_per_token * (prompt + output * age / service)
            expected += np.where((age >= 0) & (age < service), held, 0)
    assert path.at(GRID) == pytest.approx(expected, abs=1e-6)
    assert path.mean == pytest.approx(expected.mean(), rel=1e-4)
    for quantile in (0.1, 0.5, 0.9, 0.99):
        assert path.quantile(quantile) == pytest.approx(np.quantile(expected, quantile), rel=1e-3)
    fine = replay(
        TRAFFIC, [KVModel(kv.name, kv.kv_bytes_per_token, 1, 5000) for kv in MODELS], chunk_bytes=1
    )
    gap = fine.pool.at(GRID) - path.at(GRID)
    assert gap.min() > -1e-6 and gap.max() < 40 * 7


def test_quantiles_of_a_path_by_hand() -> None:
    """Flat at 10 for 2 s, rising 0 to 20 in 4 s, falling 30 to 20 in 2 s, flat at 20 for 2 s."""
    path = Timeline(
        np.array([0.0, 2, 6, 8, 10]), np.array([10.0, 0, 30, 20]), np.array([10.0, 20, 20, 20])
    )
    assert (path.mean, path.max) == ((20 + 40 + 50 + 40) / 10, 30)
    assert path.quantile(0.1) == pytest.approx(5)
    assert path.quantile(0.25) == 10
    assert path.quantile(0.39) == 10
    assert path.quantile(0.5) == pytest.approx(15)
    assert path.quantile(0.7) == 20
    assert path.quantile(0.9) == pytest.approx(25)
    assert path.share_at_most(20) == pytest.approx(0.8)
    assert path.above(15).tolist() == [[5, 10]]
    assert path.above(9).tolist() == [[0, 2], [pytest.approx(3.8), 10]]
    assert path.above(25).tolist() == [[6, 7]]
    assert path.above(30).tolist() == []
    assert path.at(np.array([0.0, 2, 4, 6, 7, 9])).tolist() == [10, 0, 10, 30, 25, 20]


def test_a_total_is_the_sum() -> None:
    paths = [
        formula_timeline(TRAFFIC, MODELS),
        rotated(replay(TRAFFIC, MODELS, chunk_bytes=100).pool, 7),
    ]
    both = total(paths)
    assert both.at(GRID) == pytest.approx(paths[0].at(GRID) + paths[1].at(GRID), abs=1e-6)


def test_a_long_poisson_trace_is_a_random_time() -> None:
    """The replay and the stationary law share no formula, and agree."""
    rng = np.random.default_rng(7)
    seconds, rate = 20_000.0, 1.5
    rows = Samples(
        rng.integers(1, 300, 1000), rng.integers(1, 400, 1000), rng.uniform(0.5, 9, 1000)
    )
    count = rng.poisson(rate * seconds)
    pick = rng.integers(0, 1000, count)
    arrivals = np.sort(rng.uniform(0, seconds, count))
    drawn = Samples(rows.prompt[pick], rows.output[pick], rows.service[pick])
    kv = [KVModel("m0", 3, 16, 5000)]
    trace = Traffic((ModelTraffic("m0", count / seconds, drawn, arrivals),), seconds)
    law = Traffic((ModelTraffic("m0", rate, rows),), math.inf)
    for charge in ("active", "promised"):
        exact = exact_demand(law, kv, charge, chunk_bytes=100)
        found = replay(trace, kv, charge, chunk_bytes=100)
        assert found.mean == pytest.approx(exact.mean, rel=0.03)
        for quantile in (0.5, 0.95, 0.99):
            assert found.quantile(quantile).value == pytest.approx(
                exact.quantile(quantile).value, rel=0.05
            )


def test_what_happens_before_and_after_is_cut_off() -> None:
    rows = Samples(np.array([15, 15, 15]), np.array([1, 1, 1]), np.array([10.0, 10.0, 10.0]))
    arrivals = np.array([-5.0, 2.0, 95.0])
    trace = Traffic((ModelTraffic("m0", 0.03, rows, arrivals),), SECONDS)
    path = replay(trace, MODELS[:1], chunk_bytes=48).pool
    assert path.times.tolist() == [0, 2, 5, 12, 95, 100]
    assert path.start.tolist() == [48, 96, 48, 0, 48]


def test_rates_without_times_cannot_be_replayed() -> None:
    rates = Traffic((ModelTraffic("m0", 1.0, model("m0", 5, 0).samples),), SECONDS)
    with pytest.raises(ConfigError, match="arrivals of m0"):
        replay(rates, MODELS[:1], chunk_bytes=1)


def test_a_model_without_requests_is_flat() -> None:
    none = Samples(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    demand = replay(
        Traffic((TRAFFIC.models[0], ModelTraffic("m1", 0.0, none)), SECONDS), MODELS, chunk_bytes=10
    )
    assert isinstance(demand, ReplayDemand)
    assert demand.models[1].max == 0
    assert demand.pool.mean == pytest.approx(demand.models[0].mean)
