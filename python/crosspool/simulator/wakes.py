"""How often models are woken when requests come one after another: the scheduler's residency with
any rule of what a model is worth, and the least that any rule could come to.

Each request is over before the next one comes, so that nothing but the rule decides who gives way.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.budgets import Budgets, WeightPlace
from crosspool.scheduler.residency import ResidencyPolicy
from crosspool.scheduler.worth import Worth
from crosspool.transport.messages import Wake


@dataclass(frozen=True)
class Wakes:
    """What a trace takes, in a pool that is empty at first."""

    number: float
    """Wakes; a fraction where it is a bound."""
    read_bytes: float


def replay(asked: Sequence[int], sizes: Sequence[int], budget: int, worth: Worth) -> Wakes:
    """Replays requests for the models ``asked`` for, in order, with the scheduler's residency and
    the rule ``worth``. ``sizes`` has each model's bytes, of which ``budget`` fit."""
    pool = Budgets([WeightPlace(device=0, role="ffn", budget=budget, held=dict(enumerate(sizes)))])
    options = {n: ModelConfig(name=f"model {n}", path="") for n in range(len(sizes))}
    residency = ResidencyPolicy(pool, options, (), quantum=1.0, worth=worth, now=0.0)
    number = read = 0
    for step, model in enumerate(asked):
        now = float(step)
        residency.used(model, now)
        if residency.state(model) == "resident":
            continue
        residency.decide({model}, now)
        while orders := list(residency.orders(frozenset())):
            for device, order in orders:
                if isinstance(order, Wake):
                    residency.woken(device, order.model, now)
                    number, read = number + 1, read + sizes[order.model]
                else:
                    residency.slept(device, order.model)
        residency.decide(frozenset(), now)
    return Wakes(number, read)


def belady(asked: Sequence[int], sizes: Sequence[int], budget: int) -> Wakes:
    """The fewest wakes, for models of one size: the model goes that is asked for again latest
    (Belady, "A study of replacement algorithms for a virtual-storage computer", 1966). Raises
    ValueError for models that differ in size."""
    if len(set(sizes)) != 1:
        raise ValueError("models differ in size: Belady's rule is not the optimum then")
    times: dict[int, list[int]] = defaultdict(list)
    for step, model in enumerate(asked):
        times[model].append(step)

    def next_use(model: int, after: int) -> float:
        later = bisect.bisect_right(times[model], after)
        return times[model][later] if later < len(times[model]) else float("inf")

    resident: set[int] = set()
    wakes = 0
    for step, model in enumerate(asked):
        if model in resident:
            continue
        wakes += 1
        if (len(resident) + 1) * sizes[0] > budget:
            resident.remove(max(resident, key=lambda m: (next_use(m, step), m)))
        resident.add(model)
    return Wakes(wakes, wakes * sizes[0])


def least_read(asked: Sequence[int], sizes: Sequence[int], budget: int) -> float:
    """Bytes that any rule reads at least: the optimum if parts of models could be kept, by linear
    programming (as in Berger, Beckmann, Harchol-Balter, "Practical bounds on optimal caching with
    variable object sizes", 2018). With models of one size it is Belady's optimum."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    steps = [m for i, m in enumerate(asked) if i == 0 or asked[i - 1] != m]
    last: dict[int, int] = {}
    spans: list[tuple[int, int]] = []
    """Steps between which a model could be kept from one request to the next."""
    for step, model in enumerate(steps):
        if model in last:
            spans.append((last[model], step))
        last[model] = step
    first = sum(sizes[model] for model in last)
    if not spans:
        return float(first)
    # What is kept over the steps in between, and what is left free at each step, are the budget
    # less the model of that step: one equation per step, of which each is written as its difference
    # to the one before, so that a span is in two of them.
    number, count = len(spans), len(steps)
    rows, columns, values = [], [], []
    for span, (start, end) in enumerate(spans):
        if end > start + 1:
            rows += [start + 1, end]
            columns += [span, span]
            values += [1.0, -1.0]
    for step in range(count):
        rows += [step, step + 1]
        columns += [number + step] * 2
        values += [1.0, -1.0]
    free = np.array([budget - sizes[model] for model in steps], dtype=float)
    matrix = coo_array((values, (rows, columns)), shape=(count + 1, number + count))
    bound = [(0.0, float(sizes[steps[start]])) for start, _ in spans]
    found = linprog(
        np.concatenate([-np.ones(number), np.zeros(count)]),
        A_eq=matrix.tocsr()[:count],
        b_eq=np.diff(free, prepend=0.0),
        bounds=[*bound, *((0.0, None) for _ in steps)],
        method="highs",
    )
    if found.status != 0:
        raise RuntimeError(f"the linear program has no solution: {found.message}")
    all_read = first + sum(sizes[steps[end]] for _, end in spans)
    return float(all_read + found.fun)
