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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Claim:
    """A request that holds pages, shared ones included, and may need ``need`` more."""

    model: int
    chunks: _Ints
    """Chunks that its pages touch: see :func:`touched`."""
    need: int


def touched(layout: KVLayout, pages: Sequence[int]) -> _Ints:
    """Chunks that ``pages`` touch, int64, ascending, each once."""
    numbers = np.asarray(pages, dtype=np.int64)
    first = numbers * layout.page_bytes // layout.chunk_bytes
    last = ((numbers + 1) * layout.page_bytes - 1) // layout.chunk_bytes
    steps = np.arange(layout.page_bytes // layout.chunk_bytes + 2)
    return np.unique(np.minimum(first[:, None] + steps, last[:, None]))


def safe(bounds: Bounds, layouts: Mapping[int, KVLayout], claims: Sequence[Claim]) -> bool:
    """Whether all claims (at least one) can be met one after another, as the module's text has it;
    what is held now is within the bounds."""
    cost = np.array([most_chunks(layouts[c.model], c.need, bounds.budget) for c in claims])
    order = np.argsort(cost, kind="stable")
    claims, cost = [claims[i] for i in order], cost[order]
    columns = {model: column for column, model in enumerate(bounds.floors)}
    models = np.array([columns[claim.model] for claim in claims])
    floors = np.array([bounds.floors[model] for model in columns])
    ceilings = np.array([bounds.ceilings[model] for model in columns])
    held = _held(claims, columns)
    before = held[np.arange(len(claims)), models]
    after = before + cost
    floor = floors[models]
    total = np.maximum(held, floors).sum(axis=1) - np.maximum(before, floor)
    meets = (after <= ceilings[models]) & (total + np.maximum(after, floor) <= bounds.budget)
    return bool(np.all(meets | (cost == 0)))


def most_chunks(layout: KVLayout, pages: int, budget: int) -> int:
    """Most chunks that so many more pages can cost."""
    if pages == 0:
        return 0
    tail = budget * layout.chunk_bytes % layout.page_bytes
    return -(-(pages * layout.page_bytes + tail) // layout.chunk_bytes)


def _held(claims: Sequence[Claim], columns: Mapping[int, int]) -> _Ints:
    """Returns how many chunks each claim and those after it touch, int64 [claims, columns], in the
    column of each model."""
    held = np.zeros((len(claims), len(columns)), dtype=np.int64)
    of_model: dict[int, list[int]] = {}
    for place, claim in enumerate(claims):
        of_model.setdefault(claim.model, []).append(place)
    for model, places in of_model.items():
        chunks = [claims[place].chunks for place in places]
        # For each chunk, the last claim in the order that touches it.
        last = np.full(max(int(c[-1]) for c in chunks) + 1, -1, dtype=np.int64)
        for place, touches in zip(places, chunks, strict=True):
            last[touches] = place
        ends = np.bincount(last[last >= 0], minlength=len(claims))
        held[:, columns[model]] = np.cumsum(ends[::-1])[::-1]
    return held
