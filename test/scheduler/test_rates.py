"""Tokens per second and the prefix cache's hit rate, as the scheduler tells them."""

from __future__ import annotations

import dataclasses

import pytest
from crosspool.models.spec import KVCacheDType
from crosspool.scheduler.rates import HIT_RATE_SECONDS, THROUGHPUT_SECONDS, RecentSum
from simulation import Simulation, deployment, request, spec


def test_a_sum_forgets_what_is_older_than_its_window() -> None:
    sum_ = RecentSum(10.0)
    assert sum_.total(3.0) == 0
    sum_.add(2, 100.0)
    sum_.add(3, 104.0)
    assert sum_.total(104.0) == 5
    assert sum_.total(109.4) == 5
    assert sum_.total(112.0) == 3
    assert sum_.total(1000.0) == 0


def test_a_sum_stays_small_however_often_something_is_added() -> None:
    sum_ = RecentSum(10.0)
    for tenth in range(10_000):
        sum_.add(1, tenth / 100)
    assert len(sum_._sums) <= 21
    assert sum_.total(99.99) == pytest.approx(1000, abs=50)


def test_the_snapshot_tells_rates_of_each_model() -> None:
    def fixed(tokens: list[int]) -> int:
        return 7

    sim = Simulation(deployment(2), [spec(), spec()], fixed)
    sim.add(request("a", 40, 20))
    sim.run()
    first, other = sim.core.snapshot().models
    assert first.tokens_per_second == 20 / THROUGHPUT_SECONDS
    assert (first.cache_hit_rate, first.waiting_tokens) == (0.0, 0)
    assert (other.tokens_per_second, other.cache_hit_rate) == (0.0, 0.0)
    prompt = request("a", 40, 20).input_ids
    sim.add(request("b", prompt, 1))
    sim.run()
    model = sim.core.snapshot().models[0]
    cached = model.cached_tokens
    assert cached > 0 and model.cache_hit_rate == cached / 80
    sim.now += THROUGHPUT_SECONDS + 1
    assert sim.core.snapshot().models[0].tokens_per_second == 0.0
    sim.now += HIT_RATE_SECONDS
    assert sim.core.snapshot().models[0].cache_hit_rate == 0.0


def test_a_pool_takes_twice_the_tokens_in_floats_of_8_bits() -> None:
    """Requests that run at the same time, in a pool that no other model uses."""
    most: dict[str, tuple[int, int]] = {}
    kinds: tuple[KVCacheDType, ...] = ("auto", "fp8_e4m3", "fp8_e5m2")
    for kind in kinds:
        of = dataclasses.replace(spec(), kv_cache_dtype=kind)
        sim = Simulation(deployment(1, max_running_requests=200), [of])
        sim.add(*(request(f"{kind}-{i}", 100, 28) for i in range(200)))
        model = sim.core.snapshot().models[0]
        assert model.waiting > 0 and model.kv_dtype == of.kv_dtype
        most[kind] = (model.running, model.pool_tokens)
    running, tokens = most["auto"]
    assert running > 20
    for kind in kinds[1:]:
        assert most[kind][1] == 2 * tokens
        assert most[kind][0] == 2 * running


def test_the_snapshot_tells_what_waits_and_how_full_the_pool_is() -> None:
    sim = Simulation(deployment(1, max_running_requests=1), [spec()])
    sim.add(request("runs", 40, 20), request("waits", 30, 5), request("waits too", 31, 5))
    model = sim.core.snapshot().models[0]
    assert (model.waiting, model.waiting_tokens) == (2, 61)
    assert model.pool_tokens == sim.deployment.kv_pool_bytes // spec().kv_bytes_per_token
    assert 60 <= model.used_tokens == model.promised_bytes // spec().kv_bytes_per_token
    assert model.token_usage == model.used_tokens / model.pool_tokens
    sim.run()
    assert sim.core.snapshot().models[0].used_tokens == 0
