"""The logical side of the KV pool: whose page is which, and what that costs in chunks.

One allocator per attention rank, kept by the scheduler. A page is free, *promised* to requests that
run, or *cached*: it holds tokens that nobody uses now. The budget is charged with every chunk that
a promised or a cached page touches, once, so a promise never fails for memory; who takes pages
first gives up as many cached ones as that needs. Physical chunks follow later, when a step first
writes.

Floors and ceilings of models bound promises (:mod:`crosspool.kvpool.bounds`); cached pages count
for neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from crosspool.config.deployment import ConfigError
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout

Guard = Callable[[list[int]], bool]
"""Says of pages that are about to be promised whether they may be."""
_Ints = npt.NDArray[np.int64]
_Mask = npt.NDArray[np.bool_]


class _Geometry:
    """The chunks that each page of a model touches: first and last, int64 [pages]; and what all
    models have in common that have pages of this size and none of them taken."""

    def __init__(self, page_bytes: int, chunk_bytes: int, budget_chunks: int) -> None:
        self.page_bytes = page_bytes
        self.chunk_bytes = chunk_bytes
        self.chunks = budget_chunks
        pages = np.arange(budget_chunks * chunk_bytes // page_bytes, dtype=np.int64)
        self.pages = len(pages)
        self.first: _Ints = pages * page_bytes // chunk_bytes
        self.last: _Ints = ((pages + 1) * page_bytes - 1) // chunk_bytes
        self.widest = int((self.last - self.first).max(initial=0)) + 1
        """Most chunks that one page touches."""

    @cached_property
    def unused(self) -> _Model:
        """A model without any page, which must not be given one."""
        return _Model(self)

    def touches(self, pages: _Ints) -> tuple[slice, _Ints]:
        """Returns a span of chunks, and for each of them how many of ``pages`` touch it."""
        if len(pages) == 0:
            return slice(0, 0), np.empty(0, dtype=np.int64)
        first, last = self.first[pages], self.last[pages]
        low, high = int(first.min()), int(last.max()) + 1
        begins = np.bincount(first - low, minlength=high - low + 1)
        ends = np.bincount(last + 1 - low, minlength=high - low + 1)
        return slice(low, high), np.cumsum(begins - ends)[:-1]


_geometry = lru_cache(maxsize=256)(_Geometry)
"""Ranks and models share those of pages of a size."""


class _PageSet:
    """Some of a model's pages, and the chunks that they touch."""

    def __init__(self, geometry: _Geometry) -> None:
        self._geometry = geometry
        self.has: _Mask = np.zeros(geometry.pages, dtype=bool)
        self.size = 0
        self.touching = np.zeros(geometry.chunks, dtype=np.int32)
        self.chunks = 0
        """Number of chunks that the set's pages touch."""
        self.costs: _Mask = np.ones(geometry.pages, dtype=bool)
        """Whether a page touches a chunk that no page of the set touches."""

    def add(self, pages: _Ints) -> None:
        span, touches = self._geometry.touches(pages)
        self.chunks += int(np.count_nonzero((touches > 0) & (self.touching[span] == 0)))
        self.touching[span] += touches
        self.has[pages] = True
        self.size += len(pages)
        self._price(span)

    def remove(self, pages: _Ints) -> _Ints:
        """Removes pages; returns the chunks that the set touches no more, ascending."""
        span, touches = self._geometry.touches(pages)
        self.touching[span] -= touches
        self.has[pages] = False
        self.size -= len(pages)
        self._price(span)
        left: _Ints = np.flatnonzero((touches > 0) & (self.touching[span] == 0)) + span.start
        self.chunks -= len(left)
        return left

    def new_chunks(self, pages: _Ints) -> int:
        """Returns how many more chunks the set would touch with ``pages``."""
        span, touches = self._geometry.touches(pages)
        return int(np.count_nonzero((touches > 0) & (self.touching[span] == 0)))

    def _price(self, span: slice) -> None:
        """Renews ``costs`` of all pages that touch the chunks of ``span``."""
        if span.start == span.stop:
            return
        g = self._geometry
        low = span.start * g.chunk_bytes // g.page_bytes
        high = min((span.stop * g.chunk_bytes - 1) // g.page_bytes + 1, g.pages)
        first, last = g.first[low:high], g.last[low:high]
        base = int(first[0])
        untouched = np.zeros(int(last[-1]) - base + 2, dtype=np.int64)
        np.cumsum(self.touching[base : int(last[-1]) + 1] == 0, out=untouched[1:])
        self.costs[low:high] = untouched[last + 1 - base] > untouched[first - base]


class _Model:
    """The pages of one model."""

    def __init__(self, geometry: _Geometry) -> None:
        self.geometry = geometry
        self.promised = _PageSet(geometry)
        self.taken = _PageSet(geometry)
        """Promised and cached pages."""
        self.mapped: _Mask = np.zeros(geometry.chunks, dtype=bool)

    def best(self, count: int) -> _Ints:
        """Returns up to ``count`` free pages: first those that cost promises no further chunk, then
        those that cost the budget none, then others, each ascending."""
        free = ~self.taken.has
        return _pick(
            count,
            free & ~self.promised.costs,
            free & self.promised.costs & ~self.taken.costs,
            free & self.taken.costs,
        )

    def best_of_all(self, count: int) -> _Ints:
        """Returns what :meth:`best` would if there were no cached pages."""
        free = ~self.promised.has
        return _pick(count, free & ~self.promised.costs, free & self.promised.costs)


def _pick(count: int, *masks: _Mask) -> _Ints:
    """The first ``count`` pages of the masks one after another, or all when there are fewer."""
    picked = np.empty(0, dtype=np.int64)
    for mask in masks:
        if len(picked) < count:
            picked = np.concatenate((picked, _first(mask, count - len(picked))))
    return picked


def _first(mask: _Mask, count: int) -> _Ints:
    """Indices of the first ``count`` true entries, or of all when there are fewer."""
    limit = 2 * count + 1024
    while True:
        found = np.flatnonzero(mask[:limit])
        if len(found) >= count or limit >= len(mask):
            return found[:count]
        limit *= 4


class PageAllocator:
    """Pages and chunks of one attention rank.

    >>> allocator = PageAllocator(budget_chunks=8, layouts={0: layout})
    >>> allocator.fits(model=0, count=3)       # False: wait
    True
    >>> allocator.shortage(model=0, count=3)   # so many cached pages have to be freed first
    0
    >>> pages = allocator.take(model=0, count=3)
    >>> allocator.map(model=0, pages=pages[:1])   # before the first step
    [0]
    >>> allocator.keep(model=0, pages=pages)      # cached from now on
    >>> allocator.free(model=0, pages=pages)      # chunks to unmap now
    [0]
    """

    def __init__(
        self,
        budget_chunks: int,
        layouts: Mapping[int, KVLayout],
        bounds: Bounds | None = None,
    ) -> None:
        """``layouts``: by the model. ``bounds``: None for no floors and no ceilings; else they have
        every model, now and when it is added, and change with the models.

        Raises ConfigError when some model could not hold one page."""
        self._layouts: dict[int, KVLayout] = {}
        self._models: dict[int, _Model] = {}
        """Models that have pages; of a thousand that are served, few have some on a rank."""
        self.budget_chunks = budget_chunks
        self._bounds = bounds or Bounds.without_floors(budget_chunks, layouts)
        self.free_chunks = budget_chunks
        """Chunks of the budget that no promised or cached page of any model touches."""
        for model, layout in layouts.items():
            self.add(model, layout)

    def add(self, model: int, layout: KVLayout) -> None:
        """A further model comes. Raises ConfigError when it could not hold one page."""
        if layout.pages_in(self._bounds.reach(model)) <= 0:
            raise ConfigError(
                f"kv_pool_bytes: {self.budget_chunks} chunks of {layout.chunk_bytes} bytes per"
                f" attention rank hold no page of model {model}, which takes"
                f" {layout.page_bytes} bytes, beside the floors of other models and below its"
                " own ceiling; enlarge the KV pool"
            )
        self._layouts[model] = layout

    def remove(self, model: int) -> None:
        """A model goes. Raises ValueError while any of its pages is promised or cached."""
        if model in self._models:
            raise ValueError(f"model {model} has {self._models[model].taken.size} pages")
        del self._layouts[model]

    def capacity(self, model: int) -> int:
        """Pages that the model could be promised if nobody else were promised any."""
        return self._layouts[model].pages_in(self._bounds.reach(model))

    def fits(self, model: int, count: int, guard: Guard | None = None) -> bool:
        """Whether ``count`` more pages could be promised if all cached pages were given up."""
        pages = self._pages_of(model).best_of_all(count)
        return len(pages) == count and self._may_promise(model, pages, guard)

    def shortage(self, model: int, count: int, guard: Guard | None = None) -> int:
        """Returns how many cached pages must at least be freed before :meth:`take`; 0: none."""
        m = self._pages_of(model)
        pages = m.best(count)
        if len(pages) < count:
            return count - len(pages)
        missing = m.taken.new_chunks(pages) - self.free_chunks
        if missing > 0:
            return -(-missing // max(other.geometry.widest for other in self._models.values()))
        # Free pages may lie so scattered between cached ones that they cost more.
        return 0 if self._may_promise(model, pages, guard) else 1

    def take(self, model: int, count: int) -> list[int]:
        """Promises ``count`` free pages. Raises ValueError where :meth:`shortage` is not 0 (but
        the guard is not asked again)."""
        if count < 1 or self.shortage(model, count):
            raise ValueError(f"model {model}: {count} pages cannot be promised now")
        m = self._models.get(model)
        if m is None:
            m = self._models[model] = _Model(self._geometry_of(model))
        pages = m.best(count)
        self.free_chunks -= m.taken.new_chunks(pages)
        m.taken.add(pages)
        m.promised.add(pages)
        granted: list[int] = pages.tolist()
        return granted

    def keep(self, model: int, pages: Sequence[int]) -> None:
        """Turns promised ``pages`` into cached ones."""
        m, array = self._checked(model, pages)
        m.promised.remove(array)

    def hold(self, model: int, pages: Sequence[int]) -> None:
        """Turns cached ``pages`` into promised ones, at no new cost to the budget."""
        m, array = self._checked(model, pages)
        m.promised.add(array)

    def free(self, model: int, pages: Sequence[int]) -> list[int]:
        """Takes promised or cached ``pages`` back; returns the mapped chunks that no page touches
        any more, ascending. The caller has them unmapped before anything else is mapped."""
        m, array = self._checked(model, pages)
        m.promised.remove(array[m.promised.has[array]])
        left = m.taken.remove(array)
        self.free_chunks += len(left)
        unmapped = left[m.mapped[left]]
        m.mapped[unmapped] = False
        if not m.taken.size:
            self._models.pop(model, None)
        chunks: list[int] = unmapped.tolist()
        return chunks

    def map(self, model: int, pages: Sequence[int]) -> list[int]:
        """Returns the chunks under ``pages`` that are not mapped yet, ascending. From now on they
        count as mapped: the caller has them mapped before those pages are written."""
        m, array = self._checked(model, pages)
        span, touches = m.geometry.touches(array)
        missing = np.flatnonzero((touches > 0) & ~m.mapped[span]) + span.start
        m.mapped[missing] = True
        chunks: list[int] = missing.tolist()
        return chunks

    def promised_chunks(self, model: int) -> int:
        """Chunks that the model's promised pages touch, mapped or not."""
        return self._pages_of(model).promised.chunks

    def taken_pages(self, model: int) -> int:
        """Number of the model's pages that are promised or cached."""
        return self._pages_of(model).taken.size

    def within_bounds(self) -> bool:
        """Whether what is promised is within the bounds, which may have changed since."""
        return self._bounds.allow({n: m.promised.chunks for n, m in self._models.items()})

    def cached_pages(self, model: int) -> int:
        m = self._pages_of(model)
        return m.taken.size - m.promised.size

    def cached_chunks(self, model: int) -> int:
        """Chunks that only cached pages of the model touch: what giving them up would free."""
        m = self._pages_of(model)
        return m.taken.chunks - m.promised.chunks

    def mapped_chunks(self, model: int) -> int:
        """Chunks of the model that are mapped."""
        return int(np.count_nonzero(self._pages_of(model).mapped))

    def _geometry_of(self, model: int) -> _Geometry:
        layout = self._layouts[model]
        return _geometry(layout.page_bytes, layout.chunk_bytes, self.budget_chunks)

    def _pages_of(self, model: int) -> _Model:
        """The model's pages, to be read; only one that has some is kept."""
        return self._models.get(model) or self._geometry_of(model).unused

    def _may_promise(self, model: int, pages: _Ints, guard: Guard | None) -> bool:
        """Whether bounds and guard let free or cached ``pages`` be promised."""
        promised = {other: m.promised.chunks for other, m in self._models.items()}
        m = self._pages_of(model)
        promised[model] = m.promised.chunks + m.promised.new_chunks(pages)
        return self._bounds.allow(promised) and (guard is None or guard(pages.tolist()))

    def _checked(self, model: int, pages: Sequence[int]) -> tuple[_Model, _Ints]:
        m = self._pages_of(model)
        array = np.asarray(pages, dtype=np.int64)
        if not m.taken.has[array].all():
            raise ValueError(f"some of pages {list(pages)} of model {model} are free")
        return m, array
