"""Compares sustained rates with closed forms, and monolithic placements with the paper's."""

import math
from dataclasses import replace

import numpy as np
import pytest
from crosspool.planner.demand import capacity
from crosspool.planner.demand.compound import exact_demand
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.devices.shared_placement import place_shared
from crosspool.planner.devices.systems import EqualDevices
from crosspool.planner.shapes import catalogue
from crosspool.planner.traffic.lengths import PUBLISHED
from crosspool.planner.traffic.popularity import openrouter
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import by_lengths
from scipy.stats import poisson

CHUNK = 1 << 20


def fixed(rate: float, service: float = 2.0) -> tuple[Traffic, list[KVModel]]:
    """Makes requests of one chunk each, whatever their age."""
    rows = Samples(np.array([15]), np.array([1]), np.array([service]))
    kv = KVModel("m", CHUNK // 16, 16, 1000)
    return Traffic((ModelTraffic("m", rate, rows),), math.inf), [kv]


@pytest.mark.parametrize("chunks", [3, 40, 400])
@pytest.mark.parametrize("quantile", [0.9, 0.99])
def test_poisson_requests_of_one_chunk(chunks: int, quantile: float) -> None:
    traffic, kv_models = fixed(0.7)
    factor = capacity.sustained(traffic, kv_models, chunks * CHUNK, quantile, chunk_bytes=CHUNK)
    mean = 0.7 * 2.0 * factor
    assert poisson.ppf(quantile, mean) <= chunks
    assert poisson.ppf(quantile, mean * (1 + 2 * capacity.TOLERANCE)) > chunks


def test_memory_below_a_chunk_sustains_nothing() -> None:
    traffic, kv_models = fixed(1.0)
    assert capacity.sustained(traffic, kv_models, CHUNK - 1, 0.99, chunk_bytes=CHUNK) == 0
    none = Traffic((replace(traffic.models[0], rate=0.0),), math.inf)
    found = capacity.sustained(none, kv_models, CHUNK, 0.99, chunk_bytes=CHUNK)
    assert found == capacity.MOST


def azure(models: int, rate: float) -> tuple[Traffic, list[KVModel]]:
    names = [f"m{index}" for index in range(models)]
    traffic = by_lengths(
        PUBLISHED["azure-conversation"],
        rate * openrouter(models),
        names,
        10_000,
        0,
        speed=DecodeSpeed(tbt_s=0.05),
    )
    return traffic, [KVModel(name, 98304, 16, 40960) for name in names]


def scaled(traffic: Traffic, factor: float) -> Traffic:
    """Returns the same requests at other rates."""
    models = tuple(replace(model, rate=model.rate * factor) for model in traffic.models)
    return Traffic(models, math.inf)


@pytest.mark.parametrize("gigabytes", [5, 90])
def test_demand_at_the_factor_fills_the_memory(gigabytes: int) -> None:
    traffic, kv_models = azure(10, 4)
    limit = gigabytes * 10**9
    factor = capacity.sustained(traffic, kv_models, limit, 0.99, chunk_bytes=2 << 20)
    filled = exact_demand(scaled(traffic, factor), kv_models, chunk_bytes=2 << 20)
    assert 0.97 < filled.quantile(0.99).value / limit < 1.01


def test_large_memory_by_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, kv_models = azure(4, 10)
    limit = 100 * 10**9
    exact = capacity.sustained(traffic, kv_models, limit, 0.99, chunk_bytes=2 << 20)
    monkeypatch.setattr(capacity, "_EXACT_CHUNKS", 0)
    moments = capacity.sustained(traffic, kv_models, limit, 0.99, chunk_bytes=2 << 20)
    assert moments == pytest.approx(exact, rel=0.01)


def test_requests_that_are_too_long() -> None:
    rows = Samples(np.array([10, 20, 30, 40]), np.array([5, 5, 5, 5]), np.ones(4))
    traffic = Traffic(
        (ModelTraffic("a", 3.0, rows), ModelTraffic("b", 1.0, rows)), seconds=math.inf
    )
    assert capacity.too_long(traffic, [45, 45]) == 0
    assert capacity.too_long(traffic, [30, 20]) == pytest.approx((3 * 0.5 + 1 * 0.75) / 4)


def test_the_papers_monolithic_placement_is_found() -> None:
    shapes = [
        catalogue.load(name) for name in ("Qwen3-30B-A3B", "GLM-4.7-Flash", "DeepSeek-V2-Lite")
    ]
    found = place_shared(shapes, EqualDevices(count=5, bytes=40 * 10**9))
    sizes = {tuple(map(len, placed.places)) for placed in found}
    assert (4, 4, 2) in sizes
    for placed in found:
        assert min(placed.system.free) > 0
        assert sum(size for _, size in placed.components) <= sum(placed.system.free)
    apart = next(placed for placed in found if sum(map(len, placed.places)) == 5)
    assert sorted(models for models, _ in apart.components) == [(0,), (1,), (2,)]
    assert place_shared(shapes, EqualDevices(count=4, bytes=40 * 10**9)) == []
