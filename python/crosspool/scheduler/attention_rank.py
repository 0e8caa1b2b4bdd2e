"""The scheduler's picture of one attention rank: its KV pages, who runs there, steps in flight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from crosspool.kvpool.allocator import PageAllocator
from crosspool.kvpool.layout import KVLayout
from crosspool.scheduler.prefix_cache import Entry, PrefixCache
from crosspool.scheduler.sequence import Sequence
from crosspool.transport.messages import Open, Release, Row, Step, StepResult


@dataclass(frozen=True)
class Flight:
    """A step that the rank has not answered yet."""

    step: int
    model: int
    issued: float
    sequences: list[Sequence]
    rows: list[Row]


class AttentionRank:
    def __init__(
        self, index: int, allocator: PageAllocator, layouts: list[KVLayout], prefix_cache: bool
    ) -> None:
        self.index = index
        self.allocator = allocator
        self.running: list[dict[int, Sequence]] = [{} for _ in layouts]
        """Per model the requests that run here, by number, in order of admission."""
        self.flights: dict[int, Flight] = {}
        """Steps in flight by model: one each."""
        self.last_step = [-1] * len(layouts)
        """Per model the number of its latest step."""
        self.evicted_pages = [0] * len(layouts)
        """Per model the cached pages given up for promises."""
        self.version = 0
        """Changes whenever somebody may fit who did not before."""
        self._layouts = layouts
        self._cache = PrefixCache() if prefix_cache else None
        self._step_numbers = count()
        self._ended: list[Sequence] = []
        self._forget: dict[int, list[int]] = defaultdict(list)
        """Per model the requests that the rank is still to be told to forget."""
        self._unmap: dict[int, list[int]] = defaultdict(list)
        """Per model the chunks that it is still to be told to unmap."""

    @property
    def promised_chunks(self) -> int:
        return sum(map(self.allocator.promised_chunks, range(len(self._layouts))))

    # --- who comes

    def match(self, seq: Sequence) -> list[Entry]:
        """The cached beginning of ``seq``'s prompt, as far as it may use it."""
        if self._cache is None:
            return []
        keys = seq.page_keys(0, seq.reusable)
        return self._cache.match(seq.model, seq.request.cache_namespace, keys)

    def admit(self, seq: Sequence) -> bool:
        """Promises ``seq`` every page that it can come to need here, if they are to be had when
        all that is cached is given up; and gives up no more than that needs.

        Cached pages lie where they lie: where a promise with them touches too many chunks, one
        without them may still fit."""
        path = self.match(seq)
        return self._admit(seq, path) or (bool(path) and self._admit(seq, []))

    def _admit(self, seq: Sequence, path: list[Entry]) -> bool:
        model = seq.model
        missing = self._layouts[model].pages_for(seq.limit) - len(path)
        idle = [entry.page for entry in path if not entry.users]
        self.allocator.hold(model, idle)
        if not self.allocator.fits(model, missing):
            self.allocator.keep(model, idle)
            return False
        if self._cache is not None:
            self._cache.use(path)
        while short := self.allocator.shortage(model, missing):
            self._evict(short)
        seq.pages = [entry.page for entry in path] + self.allocator.take(model, missing)
        seq.path = path
        seq.cached = seq.computed = len(path) * self._layouts[model].page_size
        seq.rank = self.index
        self.running[model][seq.number] = seq
        return True

    # --- steps

    def launch(self, model: int, batch: Iterable[tuple[Sequence, int]], now: float) -> Step:
        """Makes the step that takes so many further tokens of each request in ``batch``."""
        sequences: list[Sequence] = []
        opens: list[Open] = []
        rows: list[Row] = []
        map_chunks: list[int] = []
        for seq, tokens in batch:
            if not seq.opened:
                opens.append(seq.open())
            pages = self._layouts[model].pages_for(seq.computed + tokens)
            if pages > seq.pages_sent:
                map_chunks += self.allocator.map(model, seq.pages[seq.pages_sent : pages])
            rows.append(seq.next_row(tokens, pages))
            sequences.append(seq)
        number = next(self._step_numbers)
        self.last_step[model] = number
        self.flights[model] = Flight(number, model, now, sequences, rows)
        return Step(step=number, model=model, map_chunks=map_chunks, opens=opens, rows=rows)

    def land(self, result: StepResult) -> Flight:
        """The step that ``result`` answers. Raises ValueError when it answers none, or not every
        row of it."""
        flight = next((f for f in self.flights.values() if f.step == result.step), None)
        if flight is None:
            raise ValueError(f"attention rank {self.index} answered unknown step {result.step}")
        asked = [(row.request, row.sample) for row in flight.rows]
        answered = [(row.request, row.token >= 0) for row in result.rows]
        if asked != answered:
            raise ValueError(
                f"attention rank {self.index} answered step {result.step} with rows "
                f"(request, sampled) {answered} where {asked} were asked for"
            )
        del self.flights[flight.model]
        for seq, row in zip(flight.sequences, flight.rows, strict=True):
            seq.in_flight = False
            if seq.over:
                self._ended.append(seq)
            elif self._cache is not None and row.start < seq.prompt_len == seq.computed:
                self._cache.grow(
                    seq.model,
                    seq.request.cache_namespace,
                    seq.path,
                    seq.page_keys(len(seq.path), seq.prompt_len),
                    seq.pages[len(seq.path) : seq.prompt_len // self._layouts[seq.model].page_size],
                )
                self.version += 1
        return flight

    # --- who leaves

    def retire(self, seq: Sequence) -> None:
        """``seq`` runs no more; its pages are given back after its step in flight, if any."""
        del self.running[seq.model][seq.number]
        self.version += 1
        if not seq.in_flight:
            self._ended.append(seq)

    def reclaim(self) -> None:
        """Takes back the pages of every request that has ended: those that hold computed tokens
        are cached, the others free."""
        for seq in self._ended:
            model = seq.model
            if seq.opened:
                self._forget[model].append(seq.number)
            spare = seq.pages
            if self._cache is not None:
                full = seq.computed // self._layouts[model].page_size
                shared = len(seq.path)
                idle, twins = self._cache.leave(
                    model,
                    seq.request.cache_namespace,
                    seq.path,
                    seq.page_keys(shared, seq.computed),
                    seq.pages[shared:full],
                )
                self.allocator.keep(model, idle)
                spare = twins + seq.pages[full:]
            self._unmap[model] += self.allocator.free(model, spare)
            self.version += 1
        self._ended.clear()

    def flush(self, model: int | None) -> None:
        """Gives up every cached page (of ``model``, if given) that no request uses."""
        if self._cache is not None:
            self._give_back(self._cache.flush(model))

    def releases(self) -> list[Release]:
        """What the rank has to be told since the last call."""
        messages = [
            Release(model=model, requests=self._forget[model], unmap_chunks=self._unmap[model])
            for model in range(len(self._layouts))
            if self._forget[model] or self._unmap[model]
        ]
        self._forget.clear()
        self._unmap.clear()
        return messages

    def _evict(self, count: int) -> None:
        assert self._cache is not None
        given_up = self._cache.give_up(count)
        assert given_up, "promises and free chunks do not make up the budget"
        for model, _ in given_up:
            self.evicted_pages[model] += 1
        self._give_back(given_up)

    def _give_back(self, given_up: list[tuple[int, int]]) -> None:
        pages: dict[int, list[int]] = defaultdict(list)
        for model, page in given_up:
            pages[model].append(page)
        for model, of_model in pages.items():
            self._unmap[model] += self.allocator.free(model, of_model)
