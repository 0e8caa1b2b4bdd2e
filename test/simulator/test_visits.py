"""Requests that come in time, for models of which not all fit."""

from __future__ import annotations

import pytest
from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.budgets import Budgets, WeightPlace
from crosspool.scheduler.worth import HALF_LIFE_PER_MODEL, RecentRate
from crosspool.simulator.visits import Visit, serve
from crosspool.simulator.wakes import replay
from hypothesis import given, settings
from hypothesis import strategies as st


def pool(sizes, budget):
    """A device with a budget for models of these sizes, whose attention parts take nothing."""
    ffn = WeightPlace(0, "ffn", budget, dict(enumerate(sizes)))
    return Budgets([ffn, WeightPlace(0, "attention", None, dict.fromkeys(range(len(sizes)), 0))])


def models(count, **options):
    return {n: ModelConfig(name=f"model {n}", path="", **options) for n in range(count)}


def waits(visits, *, quantum=10.0):
    """What came of visits to two models of which one fits, each read in a second."""
    found = serve(visits, pool([10, 10], 10), models(2), bytes_per_s=10.0, quantum=quantum)
    return [(visited.is_hit, visited.wait) for visited in found.outcomes], found.wakes


def test_requests_wait_for_wakes_and_for_requests_of_others():
    found, wakes = waits([Visit(0.0, 0, 2.0), Visit(5.0, 1, 1.0), Visit(5.5, 0, 1.0)])
    assert found == [(True, 0.0), (False, 1.0), (False, pytest.approx(2.5))]
    assert wakes == [(6.0, 1), (8.0, 0)]


def test_a_request_during_a_wake_waits_for_the_rest_of_it():
    found, _ = waits([Visit(5.0, 1, 1.0), Visit(5.75, 1, 1.0), Visit(6.5, 1, 1.0)])
    assert found == [(False, 1.0), (False, 0.25), (True, 0.0)]


def test_models_with_requests_take_turns_of_a_quantum():
    """Each turn of three seconds follows a second of reading. A request that stands still goes on
    where it was: of twelve seconds, it has three in each turn."""
    visits = [Visit(0.0, 0, 12.0), Visit(0.0, 1, 12.0)]
    found, wakes = waits(visits, quantum=3.0)
    assert found == [(True, 0.0), (False, 4.0)]
    assert wakes == [(4.0, 1), (8.0, 0), (12.0, 1), (16.0, 0), (20.0, 1), (24.0, 0), (28.0, 1)]


def test_devices_read_at_the_same_time_and_models_on_one_in_turn():
    spots = [
        WeightPlace(0, "attention", None, {0: 5, 1: 5}),
        WeightPlace(1, "ffn", 40, {0: 20, 1: 20}),
    ]
    visits = [Visit(1.0, 0, 1.0), Visit(1.0, 1, 1.0)]
    asleep = models(2, keep="asleep")
    found = serve(visits, Budgets(spots), asleep, bytes_per_s=10.0, quantum=10.0)
    assert [visited.wait for visited in found.outcomes] == [2.0, 4.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 6))
def test_requests_one_after_another_wake_what_the_replay_of_a_trace_does(asked, fit):
    visits = [Visit(10.0 * number, model, 1.0) for number, model in enumerate(asked)]
    asleep = models(6, keep="asleep")
    found = serve(visits, pool([3] * 6, 3 * fit), asleep, bytes_per_s=3.0, quantum=5.0)
    assert len(found.wakes) == replay(asked, [3] * 6, 3 * fit, RecentRate(60)).number
    assert [v.wait for v in found.outcomes] == [0.0 if v.is_hit else 1.0 for v in found.outcomes]
    assert HALF_LIFE_PER_MODEL * 6 == 60


timed = st.tuples(st.floats(0, 30), st.integers(0, 3), st.floats(0.01, 9))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(timed, min_size=1, max_size=30),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.integers(0, 20),
)
def test_every_request_is_served_in_the_end(given_visits, sizes, more):
    visits = [Visit(*visit) for visit in sorted(given_visits)]
    budgets = pool(sizes, max(sizes) + more)
    found = serve(visits, budgets, models(4), bytes_per_s=5.0, quantum=2.0)
    for visited in found.outcomes:
        assert visited.wait == 0.0 if visited.is_hit else visited.wait >= 0.0  # no NaN
    if sum(sizes) <= max(sizes) + more:
        assert all(visited.is_hit for visited in found.outcomes) and not found.wakes
