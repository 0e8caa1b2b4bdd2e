"""Promises that grow: when more may be promised so that every admitted request can still end.

A request holds pages and may come to need so many more (its *need*, until its longest end). In the
manner of the banker's algorithm, a state is *safe* if the requests can be put in an order in which
each one's whole need fits into what is free once those before it have ended. Only promises that
leave a safe state are given.

**In chunks.** Requests of a model share chunks, and pages free up scattered, so bytes do not tell.

* What is held is counted exactly: after the first requests of the order have ended, the model's
  promises touch the chunks that pages of the others touch, ``held(i)``.
* What n more pages of p bytes cost is bounded by ``ceil((n*p + tail) / c)`` chunks of c bytes,
  however scattered the free pages are. The allocator takes pages that cost nothing first and then,
  ascending, those that touch untouched chunks. Take a run of L such chunks, as long as can be. No
  page that touches it is held, and in the range nothing lies between pages, so there are at least
  L*c/p of them, one after another, the first beginning at or before the run; thus the first m of
  them touch at most ceil(m*p/c) chunks of the run. All runs but the last one used are used up, at
  L <= m*p/c chunks for m pages. Added up, n pages touch at most ceil(n*p/c). Only the run at the
  range's end may have fewer pages, as the last ``tail`` < p bytes of the range hold none.

So a state is safe if for the requests in ascending order of cost: ``held(i) + cost(i)`` is within
the bounds, floors and ceilings of all models included.

**Why nobody is stuck.** Promises are given only if the state after them is safe, so it is safe
always: when a request ends, early or not, what is held shrinks at every place of the order and
costs stay. Say that every running request waits for more pages. Then every need is positive, and
the first of the order may be promised its *whole* need: it fits, since its cost does now, and the
state after is safe: that request's need is 0, it comes first, and what remains after its end is as
before. Therefore whoever asks for more is given its next pages if that is safe, or else all that
it can ever need if that is, or else pauses and asks again after the next change; and one of them is
given. Each ends after finitely many steps, and nobody is admitted while one is paused, so the
paused ones get their turn. Nothing is taken from anyone. Cached pages do not count: they are given
up before a promise is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout


@dataclass(frozen=True)
class Claim:
    """A request that holds pages, shared ones included, and may need ``need`` more."""

    model: int
    pages: Sequence[int]
    need: int


def safe(bounds: Bounds, layouts: Sequence[KVLayout], claims: Sequence[Claim]) -> bool:
    """Whether all claims can be met one after another, as the module's text has it."""
    cost = [_cost(layouts[claim.model], claim.need, bounds.budget) for claim in claims]
    order = sorted(range(len(claims)), key=cost.__getitem__)
    held = _held(bounds, layouts, [claims[i] for i in order])
    for place, i in enumerate(order):
        if cost[i]:
            promised = held[place].tolist()
            promised[claims[i].model] += cost[i]
            if not bounds.allow(promised):
                return False
    return True


def _cost(layout: KVLayout, pages: int, budget: int) -> int:
    """Most chunks that so many more pages can cost."""
    if pages == 0:
        return 0
    tail = budget * layout.chunk_bytes % layout.page_bytes
    return -(-(pages * layout.page_bytes + tail) // layout.chunk_bytes)


def _held(
    bounds: Bounds, layouts: Sequence[KVLayout], claims: Sequence[Claim]
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """int64 [claims, models]: chunks that the claims from each one on touch."""
    held = np.zeros((len(claims), len(layouts)), dtype=np.int64)
    last: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    for place, claim in enumerate(claims):
        layout = layouts[claim.model]
        if claim.model not in last:
            last[claim.model] = np.full(bounds.budget, -1, dtype=np.int64)
        pages = np.asarray(claim.pages, dtype=np.int64)
        first_chunk = pages * layout.page_bytes // layout.chunk_bytes
        last_chunk = ((pages + 1) * layout.page_bytes - 1) // layout.chunk_bytes
        for step in range(layout.page_bytes // layout.chunk_bytes + 2):
            last[claim.model][np.minimum(first_chunk + step, last_chunk)] = place
    for model, places in last.items():
        ends = np.bincount(places[places >= 0], minlength=len(claims))
        held[:, model] = np.cumsum(ends[::-1])[::-1]
    return held
