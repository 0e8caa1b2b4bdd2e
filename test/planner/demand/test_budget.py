"""Budgets in whole chunks per attention rank, and the saving of a common pool."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.budget import Demand, kv_budget
from crosspool.planner.demand.compound import exact_demand
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.monte_carlo import monte_carlo
from crosspool.planner.demand.replay import replay
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from scipy.stats import poisson

from benchmark.poisson_runs import poisson_run

FIXED = Samples(np.array([161]), np.array([14]), np.array([4.0]))
MODELS = 5
TRAFFIC = Traffic(tuple(ModelTraffic(f"m{i}", 0.5, FIXED) for i in range(MODELS)), math.inf)
KV = [KVModel(f"m{i}", 1, 16, 1000) for i in range(MODELS)]
CHUNK = 176


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_budget_of_poisson_demand(ranks: int) -> None:
    budget = kv_budget(exact_demand(TRAFFIC, KV, chunk_bytes=CHUNK), KV, 0.99, ranks)
    chunks = int(poisson(MODELS * 2).ppf(0.99))
    assert budget.demand.value == chunks * CHUNK
    assert budget.rank_chunks == math.ceil(chunks / ranks)
    assert 0 <= budget.pool_bytes - chunks * CHUNK < ranks * CHUNK
    assert budget.static_bytes == MODELS * poisson(2).ppf(0.99) * CHUNK
    assert budget.saving == 1 - budget.pool_bytes / budget.static_bytes > 0
    model = budget.models[0]
    assert model.page_bytes == 16
    assert model.rank_pages == budget.rank_bytes // 16
    # 63 pages of 16 bytes in chunks of 176
    assert model.longest_bytes == 6 * CHUNK
    assert budget.longest_bytes == MODELS * 6 * CHUNK


def test_the_three_demands_give_one_budget() -> None:
    trace = poisson_run(TRAFFIC, 20_000.0, np.random.default_rng(0))
    demands: list[Demand] = [
        exact_demand(TRAFFIC, KV, chunk_bytes=CHUNK),
        monte_carlo(TRAFFIC, KV, 200_000, 0, chunk_bytes=CHUNK),
        replay(trace, KV, chunk_bytes=CHUNK),
    ]
    budgets = [kv_budget(demand, KV, 0.95, 2) for demand in demands]
    for demand, budget in zip(demands, budgets, strict=True):
        assert budget.models == budgets[0].models
        assert budget.pool_bytes == budgets[0].pool_bytes
        assert demand.exceeds(budget.demand.value) <= 0.05
        assert demand.exceeds(budget.demand.value - 1) > 0.05


def test_a_pool_has_ranks() -> None:
    with pytest.raises(ConfigError, match="ranks"):
        kv_budget(exact_demand(TRAFFIC, KV, chunk_bytes=CHUNK), KV, 0.99, 0)
