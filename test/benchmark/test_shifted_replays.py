"""Replays whose models are moved apart in time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crosspool.planner.demand.compound import convolution
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.replay import replay
from crosspool.planner.demand.timeline import total
from crosspool.planner.traffic.samples import ModelTraffic, Traffic
from support.replayed import GRID, MODELS, SECONDS, TRAFFIC, formula_timeline, model

from benchmark.shifted_replays import independent_shifts, rotated


@pytest.mark.parametrize("by", [0.0, 3.0, 33.3, 99.9, 250.0])
def test_a_rotation_moves_values_and_keeps_their_times(by: float) -> None:
    for path in (formula_timeline(TRAFFIC, MODELS), replay(TRAFFIC, MODELS, chunk_bytes=100).pool):
        moved = rotated(path, by)
        assert moved.at(GRID) == pytest.approx(path.at((GRID - by) % SECONDS), abs=1e-6)
        assert moved.mean == pytest.approx(path.mean)
        for quantile in (0.2, 0.9):
            assert moved.quantile(quantile) == pytest.approx(path.quantile(quantile))


def test_shifts_give_the_product_of_what_each_model_does_alone() -> None:
    """At a fixed time, each shifted model is an independent draw from its own distribution over
    time; so the distributions over time, averaged over shifts, are the convolution of those."""
    demand = replay(TRAFFIC, MODELS, chunk_bytes=1000)
    laws = []
    for path in demand.models:
        chunks = (path.start / 1000).astype(int)
        laws.append(np.bincount(chunks, weights=np.diff(path.times) / SECONDS))
    pool = np.cumsum(convolution(laws))
    rng = np.random.default_rng(0)
    shifted = [
        total(
            [
                rotated(path, by)
                for path, by in zip(demand.models, rng.uniform(0, 100, 2), strict=True)
            ]
        )
        for _ in range(300)
    ]
    for chunks in (8, 14, 20):
        found = [path.share_at_most(chunks * 1000) for path in shifted]
        error = np.std(found) / math.sqrt(len(found))
        assert np.mean(found) == pytest.approx(pool[chunks], abs=4 * error)


def test_bursts_that_meet_need_more_than_shifted_ones() -> None:
    """Ten models that all burst in the same 10 s: they need together what they need one by one,
    and shifted apart less."""
    burst = model("m0", 20, 0)
    arrivals = np.sort(np.random.default_rng(0).uniform(45, 55, 20))
    models = tuple(ModelTraffic(f"m{i}", 0.2, burst.samples, arrivals) for i in range(10))
    kv = [KVModel(f"m{i}", 3, 16, 5000) for i in range(10)]
    demand = replay(Traffic(models, SECONDS), kv, chunk_bytes=100)
    shifted = independent_shifts(demand, 0.99, 20, seed=1)
    assert shifted.max() < 0.8 * demand.quantile(0.99).value
    assert shifted.tolist() == independent_shifts(demand, 0.99, 20, seed=1).tolist()
    assert shifted.tolist() != independent_shifts(demand, 0.99, 20, seed=2).tolist()
