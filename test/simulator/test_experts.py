"""Hits of a pool of experts by a rule, and the most that any rule could come to."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from crosspool.scheduler.worth import RecentRate
from crosspool.simulator.experts import most_hits, replay_experts
from crosspool.simulator.rules import LeastFrequentlyUsed, LeastRecentlyUsed
from hypothesis import given, settings
from hypothesis import strategies as st
from support.expert_memory import ExpertMemory

routings_of_six = st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=2), max_size=12)


@settings(max_examples=80, deadline=None)
@given(routings_of_six, st.integers(2, 5))
def test_belady_is_the_best_of_all_choices(routings: list[set[int]], room: int) -> None:
    @cache
    def fewest(number: int, present: frozenset[int]) -> int:
        """The fewest misses from a routing on."""
        if number == len(routings):
            return 0
        routing = frozenset(routings[number])
        absent = routing - present
        more = max(0, len(present | routing) - room)
        return len(absent) + min(
            fewest(number + 1, (present | routing) - set(going))
            for going in combinations(sorted(present - routing), more)
        )

    assert most_hits(routings, room).misses == fewest(0, frozenset())


@settings(max_examples=80, deadline=None)
@given(routings_of_six, st.integers(2, 5))
def test_no_rule_finds_more_than_the_best(routings: list[set[int]], room: int) -> None:
    best = most_hits(routings, room)
    for rule in (RecentRate(8), LeastRecentlyUsed(), LeastFrequentlyUsed()):
        assert replay_experts(routings, room, rule).misses >= best.misses


def drawn(steps: int, layers: int, skew: float) -> list[list[int]]:
    """Routings of a model with 16 experts in a layer, of which two are chosen."""
    random = np.random.default_rng(1)
    likes = random.normal(0, skew, (layers, 16))
    logits = random.normal(0, 1, (steps, layers, 16)) + likes
    chosen = np.argsort(-logits, axis=2)[:, :, :2] + 16 * np.arange(layers)[:, None]
    return [list(map(int, layer)) for step in chosen for layer in step]


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_the_pools_memory_finds_what_its_rule_does(skew: float) -> None:
    """Experts of one size in the pool's memory, which counts a use by layers of steps, and by the
    rule, which counts it by experts."""
    routings = drawn(400, 4, skew)
    memory, room = ExpertMemory(32 * 64), 32
    memory.half_life(64 * 4)
    for _ in range(64):
        memory.add(64)
    misses = 0
    for routing in routings:
        memory.tick()
        absent = [expert for expert in routing if memory.of(expert).offset is None]
        misses += len(absent)
        for expert in routing:
            memory.use(expert)
            memory.hold(expert)
        for expert in absent:
            assert memory.place(expert) is not None
        for expert in routing:
            memory.release(expert)
    found = replay_experts(routings, room, RecentRate(2 * 64 * 4))
    assert abs(found.misses - misses) < 0.02 * misses


def test_skewed_routing_is_found_more_often() -> None:
    flat, skewed = (
        replay_experts(drawn(400, 4, skew), 32, RecentRate(512), warm=400) for skew in (0.0, 1.0)
    )
    assert abs(flat.rate - 0.5) < 0.04
    assert skewed.rate > 0.75


def test_a_pool_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 experts, and 2 have room"):
        replay_experts([[0, 1, 2]], 2, LeastRecentlyUsed())
