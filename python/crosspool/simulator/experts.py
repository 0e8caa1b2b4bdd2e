"""How often experts are found in a pool that holds some of them, by any rule of what an expert is
worth, and at best, for routings that were recorded.

A routing is what one layer of one step chose: its experts, by numbers that no other layer or model
uses. All are needed at once, so none of them goes for another of the same routing. Experts are of
one size. The pool's own rule, for any sizes, is that of
:class:`~crosspool.scheduler.worth.RecentRate` per byte (sgl-kernel-ext/cpu/engine/expert_memory.h).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from crosspool.scheduler.worth import Worth

Routing = Collection[int]


@dataclass(frozen=True)
class ExpertHits:
    """What a pool has found and not found."""

    hits: int
    misses: int

    @property
    def rate(self) -> float:
        """Share of the needed experts that were there."""
        return self.hits / max(1, self.hits + self.misses)


def replay_experts(
    routings: Sequence[Routing], room: int, rule: Worth, *, warm: int = 0
) -> ExpertHits:
    """Replays routings in a pool for ``room`` experts, which is empty at first; that goes which is
    worth least by ``rule``. The first ``warm`` routings are not counted.

    Raises ValueError when a routing has more experts than there is room for."""

    def make_room(loose: Collection[int], count: int, number: int) -> list[int]:
        del number
        going = heapq.nsmallest(count, loose, key=lambda expert: (rule.of(expert), expert))
        for expert in going:
            rule.gave_way(expert)
        return going

    return _replay(routings, room, rule.used, make_room, warm)


def most_hits(routings: Sequence[Routing], room: int, *, warm: int = 0) -> ExpertHits:
    """The most that any rule finds: that goes which is needed again latest (Belady, "A study of
    replacement algorithms for a virtual-storage computer", 1966). Raises ValueError likewise."""
    times: dict[int, list[int]] = defaultdict(list)
    for number, routing in enumerate(routings):
        for expert in routing:
            times[expert].append(number)

    def again(expert: int, after: int) -> float:
        later = bisect_right(times[expert], after)
        return times[expert][later] if later < len(times[expert]) else math.inf

    def make_room(loose: Collection[int], count: int, number: int) -> list[int]:
        return heapq.nlargest(count, loose, key=lambda expert: (again(expert, number), expert))

    return _replay(routings, room, lambda expert: None, make_room, warm)


def _replay(
    routings: Sequence[Routing],
    room: int,
    used: Callable[[int], None],
    make_room: Callable[[Collection[int], int, int], list[int]],
    warm: int,
) -> ExpertHits:
    """``make_room`` chooses so many of those that may go, at the routing of that number."""
    present: set[int] = set()
    hits = misses = 0
    for number, routing in enumerate(routings):
        absent = [expert for expert in routing if expert not in present]
        for expert in routing:
            used(expert)
        if number >= warm:
            hits, misses = hits + len(routing) - len(absent), misses + len(absent)
        if len(routing) > room:
            raise ValueError(f"a routing has {len(routing)} experts, and {room} have room")
        if (more := len(present) + len(absent) - room) > 0:
            present.difference_update(make_room(present.difference(routing), more, number))
        present.update(absent)
    return ExpertHits(hits, misses)
