"""The KV pages of one attention rank: promised to requests, or kept as cached prefixes.

A request is promised pages when it is admitted, and under a rule that grows again whenever it has
filled them. Cached pages are given up for a promise, the least recently used first, before any
request waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.kvpool.allocator import PageAllocator
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout
from crosspool.scheduler.prefix_cache import Entry, PrefixCache
from crosspool.scheduler.promise_rules import PROMISE_RULES
from crosspool.scheduler.sequence import Sequence


class Promises:
    """Gives pages to requests by the deployment's promise rule, and takes them back."""

    def __init__(
        self, deployment: Deployment, bounds: Bounds, layouts: Mapping[int, KVLayout]
    ) -> None:
        """``bounds`` and ``layouts`` are those of the models that there are at any time. Raises
        ConfigError when some model could not be promised one page."""
        self.evicted_pages = dict.fromkeys(layouts, 0)
        """Cached pages given up for promises, by model."""
        self._deployment = deployment
        self._bounds = bounds
        self._layouts = layouts
        self.forget()

    def forget(self) -> None:
        """The rank is new: nothing is promised, cached or mapped there. Raises like the class."""
        self.allocator = PageAllocator(self._bounds.budget, self._layouts, self._bounds)
        rule = PROMISE_RULES[self._deployment.promise]
        self.rule = rule(self._deployment, self._bounds, self._layouts)
        self._cache = PrefixCache() if self._deployment.prefix_cache else None
        self._unmap: dict[int, list[int]] = defaultdict(list)

    @property
    def promised_chunks(self) -> int:
        return sum(map(self.allocator.promised_chunks, self._layouts))

    # --- models that come and go

    def add_model(self, model: int) -> None:
        """A further model comes, which has a layout and bounds. Raises ConfigError when it could
        not be promised one page, or what is promised now leaves no room for its floor."""
        floors, budget = sum(self._bounds.floors.values()), self._bounds.budget
        if floors > budget:
            raise ConfigError(
                f"kv_floor_bytes: the floors of all models come to {floors} chunks per attention "
                f"rank, and there are {budget}: lower them, or enlarge the KV pool"
            )
        self.allocator.add(model, self._layouts[model])
        if not (self.allocator.within_bounds() and self.rule.is_safe()):
            self.allocator.remove(model)
            raise ConfigError(
                f"kv_floor_bytes: what running requests hold leaves no {self._bounds.floors[model]}"
                " free chunks per attention rank for the floor of a further model now; try again"
                " later, or give it a smaller floor"
            )
        self.evicted_pages[model] = 0

    def holds_any(self, model: int) -> bool:
        """Whether any page of the model is promised or cached, or any chunk is yet to be
        unmapped."""
        return bool(self.allocator.taken_pages(model) or self._unmap.get(model))

    def remove_model(self, model: int) -> None:
        """A model goes, of which nothing is held."""
        self.allocator.remove(model)
        del self.evicted_pages[model]

    # --- giving

    def match(self, seq: Sequence) -> list[Entry]:
        """The cached beginning of ``seq``'s prompt, as far as ``seq`` may use it."""
        cache = self._cache_of(seq.model)
        if cache is None:
            return []
        keys = seq.page_keys(0, seq.reusable)
        return cache.match(seq.model, seq.request.cache_namespace, keys)

    def admit(self, seq: Sequence) -> bool:
        """Promises ``seq`` pages for its uncached tokens and for what may follow, if there is room
        for them once every cached page is given up; gives up no more than that needs. Returns
        whether there is.

        Cached pages cannot move: where a promise that includes them touches too many chunks, one
        without them may still fit."""
        path = self.match(seq)
        return self._admit(seq, path) or (bool(path) and self._admit(seq, []))

    def _admit(self, seq: Sequence, path: list[Entry]) -> bool:
        idle = [entry.page for entry in path if not entry.users]
        shared = [entry.page for entry in path]
        self.allocator.hold(seq.model, idle)
        count = self._grantable(seq, shared, len(seq.tokens))
        if count is None:
            self.allocator.keep(seq.model, idle)
            return False
        if self._cache is not None:
            self._cache.use(path)
        seq.path = path
        seq.computed = len(path) * self._layouts[seq.model].page_size
        if not seq.replayed:
            seq.cached = seq.computed
        self._grant(seq, shared, count)
        return True

    def extend(self, seq: Sequence) -> bool:
        """Promises ``seq`` its next pages if they fit; returns whether they do."""
        count = self._grantable(seq, seq.pages, len(seq.tokens))
        if count is None:
            return False
        self._grant(seq, seq.pages, count)
        return True

    def holds(self, seq: Sequence, tokens: int) -> bool:
        """Whether ``seq`` has pages for its first ``tokens`` tokens."""
        return len(seq.pages) >= self._layouts[seq.model].pages_for(tokens)

    def _grantable(self, seq: Sequence, pages: list[int], tokens: int) -> int | None:
        """Number of pages to promise ``seq``, which holds ``pages`` and has ``tokens`` tokens; None
        where it has to wait."""
        counts = self.rule.counts(seq, len(pages), tokens)
        guard = self.rule.guard(seq, pages)
        return next((n for n in counts if self.allocator.fits(seq.model, n, guard)), None)

    def _grant(self, seq: Sequence, pages: list[int], count: int) -> None:
        # Where the model has cached pages, the free ones may differ from those that _grantable saw.
        cached = self.allocator.cached_pages(seq.model)
        guard = self.rule.guard(seq, pages) if cached else None
        while short := self.allocator.shortage(seq.model, count, guard):
            self._evict(short)
        seq.pages = pages + self.allocator.take(seq.model, count)
        self.rule.promised(seq)

    # --- taking back

    def share(self, seq: Sequence) -> bool:
        """The full pages of ``seq``'s prompt are computed; other requests may use them from now on.
        Returns whether there is a cache for them."""
        cache = self._cache_of(seq.model)
        if cache is None:
            return False
        full = seq.prompt_len // self._layouts[seq.model].page_size
        cache.grow(
            seq.model,
            seq.request.cache_namespace,
            seq.path,
            seq.page_keys(len(seq.path), seq.prompt_len),
            seq.pages[len(seq.path) : full],
        )
        return True

    def take_back(self, seq: Sequence) -> None:
        """``seq`` has ended: its full pages of computed tokens are cached, its other pages free."""
        self.rule.ended(seq)
        spare = seq.pages
        cache = self._cache_of(seq.model)
        if cache is not None:
            full = seq.computed // self._layouts[seq.model].page_size
            shared = len(seq.path)
            idle, twins = cache.leave(
                seq.model,
                seq.request.cache_namespace,
                seq.path,
                seq.page_keys(shared, seq.computed),
                seq.pages[shared:full],
            )
            self.allocator.keep(seq.model, idle)
            spare = twins + seq.pages[full:]
        self._unmap[seq.model] += self.allocator.free(seq.model, spare)

    def flush(self, model: int | None) -> None:
        """Gives up every cached page (of ``model``, if given) that no request uses."""
        if self._cache is not None:
            self._free(self._cache.flush(model))

    def _cache_of(self, model: int) -> PrefixCache | None:
        """The prefix cache, unless the model has recurrent state, which no two requests share."""
        return None if self._layouts[model].state_pages else self._cache

    def chunks_to_unmap(self) -> dict[int, list[int]]:
        """Chunks of each model that no page touches any more, since the last call."""
        chunks, self._unmap = self._unmap, defaultdict(list)
        return chunks

    def _evict(self, count: int) -> None:
        assert self._cache is not None
        given_up = self._cache.give_up(count)
        assert given_up, "the promised and the free chunks do not add up to the budget"
        for model, _ in given_up:
            self.evicted_pages[model] += 1
        self._free(given_up)

    def _free(self, given_up: list[tuple[int, int]]) -> None:
        pages: dict[int, list[int]] = defaultdict(list)
        for model, page in given_up:
            pages[model].append(page)
        for model, of_model in pages.items():
            self._unmap[model] += self.allocator.free(model, of_model)
