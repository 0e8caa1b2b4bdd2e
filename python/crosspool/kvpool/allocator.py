"""The logical side of the KV pool: which pages are promised to whom, and what that costs.

One allocator per attention rank, kept by the scheduler. Admission reserves all pages that a request
may come to need; the budget is charged with every chunk that a reserved page touches, once, so an
admitted request never fails for memory. Physical chunks follow later, when a step first writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crosspool.config.deployment import ConfigError
from crosspool.kvpool.layout import KVLayout

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Reservation:
    """Pages promised to one request. Its tokens fill them in this order."""

    model: int
    pages: list[int]


@dataclass(frozen=True)
class _Choice:
    """Pages for a reservation, how often they touch each chunk of a span, and new chunks."""

    pages: _Ints
    span: slice
    touches: _Ints
    cost: int


class _Model:
    """The pages of one model: who holds them, and how many reserved pages touch each chunk."""

    def __init__(self, layout: KVLayout, budget_chunks: int) -> None:
        self.layout = layout
        pages = np.arange(layout.pages_in(budget_chunks), dtype=np.int64)
        self.first_chunk: _Ints = pages * layout.page_bytes // layout.chunk_bytes
        self.last_chunk: _Ints = ((pages + 1) * layout.page_bytes - 1) // layout.chunk_bytes
        self.free = np.ones(len(pages), dtype=bool)
        self.free_pages = len(pages)
        self.costs = np.ones(len(pages), dtype=bool)
        """Whether a page touches a chunk that no reserved page touches."""
        self.touching = np.zeros(budget_chunks, dtype=np.int64)
        self.mapped = np.zeros(budget_chunks, dtype=bool)

    def best(self, count: int) -> _Ints:
        """Up to ``count`` free pages: those that cost no new chunk, then others, each ascending."""
        cheap = _first(self.free & ~self.costs, count)
        if len(cheap) == count:
            return cheap
        return np.concatenate((cheap, _first(self.free & self.costs, count - len(cheap))))

    def touches(self, pages: _Ints) -> tuple[slice, _Ints]:
        """A span of chunks, and for each of them how many of ``pages`` touch it."""
        first, last = self.first_chunk[pages], self.last_chunk[pages]
        low, high = int(first.min()), int(last.max()) + 1
        begins = np.bincount(first - low, minlength=high - low + 1)
        ends = np.bincount(last + 1 - low, minlength=high - low + 1)
        return slice(low, high), np.cumsum(begins - ends)[:-1]

    def change(self, pages: _Ints, span: slice, touches: _Ints, *, free: bool) -> None:
        """Takes or frees ``pages``, which touch the chunks of ``span`` so many times."""
        self.free[pages] = free
        self.free_pages += len(pages) if free else -len(pages)
        self.touching[span] += -touches if free else touches
        low = span.start * self.layout.chunk_bytes // self.layout.page_bytes
        high = min(
            (span.stop * self.layout.chunk_bytes - 1) // self.layout.page_bytes + 1, len(self.free)
        )
        first, last = self.first_chunk[low:high], self.last_chunk[low:high]
        base = int(first[0])
        untouched = np.zeros(int(last[-1]) - base + 2, dtype=np.int64)
        np.cumsum(self.touching[base : int(last[-1]) + 1] == 0, out=untouched[1:])
        self.costs[low:high] = untouched[last + 1 - base] > untouched[first - base]


def _first(mask: npt.NDArray[np.bool_], count: int) -> _Ints:
    """Indices of the first ``count`` true entries, or of all when there are fewer."""
    limit = 2 * count + 1024
    while True:
        found = np.flatnonzero(mask[:limit])
        if len(found) >= count or limit >= len(mask):
            return found[:count]
        limit *= 4


class PageAllocator:
    """Pages and chunks of one attention rank.

    >>> allocator = PageAllocator(budget_chunks=8, layouts=[layout])
    >>> reservation = allocator.reserve(model=0, pages=3)       # None: wait
    >>> allocator.chunks_to_map(reservation, first_n_pages=1)   # before the first step
    [0]
    >>> allocator.release(reservation)                          # chunks to unmap now
    [0]
    """

    def __init__(self, budget_chunks: int, layouts: Sequence[KVLayout]) -> None:
        """``layouts``: one per model, in the deployment's order.

        Raises ConfigError when the budget does not hold one page of every model."""
        for index, layout in enumerate(layouts):
            if layout.pages_in(budget_chunks) == 0:
                raise ConfigError(
                    f"kv_pool_bytes: {budget_chunks} chunks of {layout.chunk_bytes} bytes per"
                    f" attention rank hold no page of model {index}, which takes"
                    f" {layout.page_bytes} bytes; enlarge the KV pool"
                )
        self._models = [_Model(layout, budget_chunks) for layout in layouts]
        self._live: set[Reservation] = set()
        self.free_chunks = budget_chunks
        """Chunks of the budget that no reserved page of any model touches."""

    def capacity(self, model: int) -> int:
        """Pages that the model could hold if the pool were its own."""
        return len(self._models[model].free)

    def free_pages(self, model: int) -> int:
        """Pages of the model that nobody holds, whatever their chunks would cost."""
        return self._models[model].free_pages

    def can_reserve(self, model: int, pages: int) -> bool:
        """Whether :meth:`reserve` would succeed now."""
        return self._choose(model, pages) is not None

    def reserve(self, model: int, pages: int) -> Reservation | None:
        """Promises ``pages`` (at least one) pages, or None when they do not fit into the budget."""
        choice = self._choose(model, pages)
        if choice is None:
            return None
        self._models[model].change(choice.pages, choice.span, choice.touches, free=False)
        self.free_chunks -= choice.cost
        reservation = Reservation(model, choice.pages.tolist())
        self._live.add(reservation)
        return reservation

    def chunks_to_map(self, reservation: Reservation, first_n_pages: int) -> list[int]:
        """Chunks under the reservation's first ``first_n_pages`` pages that are not mapped
        yet, ascending. From now on they count as mapped: the caller has them mapped before
        those pages are written."""
        self._check_live(reservation)
        model = self._models[reservation.model]
        pages = np.asarray(reservation.pages[:first_n_pages], dtype=np.int64)
        if len(pages) == 0:
            return []
        span, touches = model.touches(pages)
        missing = np.flatnonzero((touches > 0) & ~model.mapped[span]) + span.start
        model.mapped[missing] = True
        return missing.tolist()

    def release(self, reservation: Reservation) -> list[int]:
        """Takes the pages back; returns the mapped chunks that no reserved page touches any more,
        ascending. The caller has them unmapped before anything else is mapped."""
        self._check_live(reservation)
        self._live.remove(reservation)
        model = self._models[reservation.model]
        pages = np.asarray(reservation.pages, dtype=np.int64)
        span, touches = model.touches(pages)
        model.change(pages, span, touches, free=True)
        dropped = (touches > 0) & (model.touching[span] == 0)
        self.free_chunks += int(np.count_nonzero(dropped))
        unmapped = np.flatnonzero(dropped & model.mapped[span]) + span.start
        model.mapped[unmapped] = False
        return unmapped.tolist()

    def mapped_chunks(self, model: int) -> int:
        """Chunks of the model that are mapped."""
        return int(np.count_nonzero(self._models[model].mapped))

    def reserved_chunks(self, model: int) -> int:
        """Chunks of the budget that the model's reserved pages touch, mapped or not."""
        return int(np.count_nonzero(self._models[model].touching))

    def _choose(self, index: int, count: int) -> _Choice | None:
        if count < 1:
            raise ValueError(f"{count} pages: a reservation has at least one")
        model = self._models[index]
        if model.free_pages < count:
            return None
        pages = model.best(count)
        span, touches = model.touches(pages)
        cost = int(np.count_nonzero((touches > 0) & (model.touching[span] == 0)))
        return _Choice(pages, span, touches, cost) if cost <= self.free_chunks else None

    def _check_live(self, reservation: Reservation) -> None:
        if reservation not in self._live:
            raise ValueError("this reservation is not the allocator's, or it was released")
