"""How often models are woken by a rule, and the least that any rule could come to."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crosspool.scheduler.worth import RecentRate
from crosspool.simulator.rules import (
    FrequencyWithAging,
    GreedyDual,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
)
from crosspool.simulator.wakes import belady, least_read, replay
from hypothesis import given, settings
from hypothesis import strategies as st

TRACE = Path(__file__).parents[3] / "shared" / "data" / "azure_llm_2023_conv.csv"


def reference(asked, sizes, budget, worth):
    """A pool with the rule ``worth`` and nothing else."""
    resident, wakes = set(), 0
    for model in asked:
        worth.used(model)
        if model not in resident:
            wakes += 1
            resident.add(model)
            while sum(sizes[m] for m in resident) > budget:
                victim = min(resident - {model}, key=lambda m: (worth.of(m), m))
                worth.gave_way(victim)
                resident.discard(victim)
    return wakes


RULES = {
    "recent": lambda sizes: RecentRate(20),
    "lru": lambda sizes: LeastRecentlyUsed(),
    "lfu": lambda sizes: LeastFrequentlyUsed(),
    "greedy dual": GreedyDual,
    "aging": lambda sizes: FrequencyWithAging(),
}
asked_for = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(asked_for, st.integers(1, 6))
def test_the_scheduler_wakes_as_the_rule_says(rule, asked, fit):
    sizes = [3] * 6
    made = RULES[rule]
    found = replay(asked, sizes, 3 * fit, made(sizes))
    assert found.number == reference(asked, sizes, 3 * fit, made(sizes))
    assert found.read_bytes == 3 * found.number


def fewest(asked, sizes, budget):
    """The fewest bytes that are read, by trying everything."""
    states = {frozenset(): 0}
    for model in asked:
        after: dict[frozenset, int] = {}
        for resident, cost in states.items():
            if model in resident:
                after[resident] = min(cost, after.get(resident, cost))
                continue
            others = list(resident)
            for kept in range(1 << len(others)):
                chosen = {m for i, m in enumerate(others) if kept >> i & 1} | {model}
                if sum(sizes[m] for m in chosen) <= budget:
                    state, total = frozenset(chosen), cost + sizes[model]
                    after[state] = min(total, after.get(state, total))
        states = after
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(1, 5))
def test_belady_s_rule_is_the_optimum_for_one_size(asked, fit):
    best = belady(asked, [2] * 5, 2 * fit)
    assert best.read_bytes == fewest(asked, [2] * 5, 2 * fit)
    assert least_read(asked, [2] * 5, 2 * fit) == pytest.approx(best.read_bytes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=25),
    st.lists(st.integers(1, 5), min_size=5, max_size=5),
    st.integers(0, 6),
)
def test_nobody_reads_less_than_the_bound(asked, sizes, more):
    budget = max(sizes) + more
    bound = least_read(asked, sizes, budget)
    assert bound <= fewest(asked, sizes, budget) + 1e-6
    assert bound <= replay(asked, sizes, budget, RecentRate(20)).read_bytes + 1e-6


def test_belady_s_rule_is_not_told_of_models_of_several_sizes():
    with pytest.raises(ValueError, match="differ in size"):
        belady([0, 1], [1, 2], 2)


def test_the_server_s_rule_wakes_fewer_models_than_lru_and_lfu():
    """Popularity as in Zipf's law wakes fewer with counts than with times; when it changes, it is
    the other way round. The server's rule is better than both in both."""
    numbers = random.Random(0)
    steady = numbers.choices(range(12), [(rank + 1) ** -1.3 for rank in range(12)], k=6000)
    changing = [(model + step // 1000 * 5) % 12 for step, model in enumerate(steady)]
    for asked in (steady, changing):
        mine, *others = (
            replay(asked, [1] * 12, 4, rule).number
            for rule in (RecentRate(120), LeastRecentlyUsed(), LeastFrequentlyUsed())
        )
        assert mine < 1.03 * min(others) and mine < 0.85 * max(others)


@pytest.mark.skipif(not TRACE.exists(), reason="the Azure trace is not there")
def test_on_a_trace_that_was_recorded():
    from benchmark.residency import popular, recorded

    asked = popular(recorded(TRACE)[:3000], 30, changing=False, seed=0)
    best = belady(asked, [1] * 30, 6).number
    assert replay(asked, [1] * 30, 6, RecentRate(300)).number < 1.35 * best
    assert replay(asked, [1] * 30, 6, LeastRecentlyUsed()).number > 1.45 * best
