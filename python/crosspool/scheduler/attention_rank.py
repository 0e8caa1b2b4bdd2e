"""The scheduler's picture of one attention rank: its KV pages, who runs there, steps in flight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from crosspool.kvpool.allocator import PageAllocator
from crosspool.kvpool.layout import KVLayout
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
    def __init__(self, index: int, budget_chunks: int, layouts: list[KVLayout]) -> None:
        self.index = index
        self.budget_chunks = budget_chunks
        self.allocator = PageAllocator(budget_chunks, layouts)
        self.running: list[dict[int, Sequence]] = [{} for _ in layouts]
        """Per model the requests that run here, by number, in order of admission."""
        self.flights: dict[int, Flight] = {}
        """Steps in flight by model: one each."""
        self.last_step = [-1] * len(layouts)
        """Per model the number of its latest step."""
        self._layouts = layouts
        self._step_numbers = count()
        self._ended: list[Sequence] = []

    def admit(self, seq: Sequence) -> bool:
        """Promises ``seq`` every page that it can come to need here, if they are to be had."""
        pages = self._layouts[seq.model].pages_for(seq.limit)
        seq.reservation = self.allocator.reserve(seq.model, pages)
        if seq.reservation is None:
            return False
        seq.rank = self.index
        self.running[seq.model][seq.number] = seq
        return True

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
                assert seq.reservation is not None
                map_chunks += self.allocator.chunks_to_map(seq.reservation, pages)
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
        for seq in flight.sequences:
            seq.in_flight = False
            if seq.over:
                self._ended.append(seq)
        return flight

    def retire(self, seq: Sequence) -> None:
        """``seq`` runs no more; its pages are given back after its step in flight, if any."""
        del self.running[seq.model][seq.number]
        if not seq.in_flight:
            self._ended.append(seq)

    def release(self) -> list[Release]:
        """Gives back the pages of every request that has ended since the last call."""
        requests: dict[int, list[int]] = defaultdict(list)
        chunks: dict[int, list[int]] = defaultdict(list)
        for seq in self._ended:
            assert seq.reservation is not None
            chunks[seq.model] += self.allocator.release(seq.reservation)
            if seq.opened:
                requests[seq.model].append(seq.number)
        self._ended.clear()
        return [
            Release(model=model, requests=requests[model], unmap_chunks=unmap)
            for model, unmap in chunks.items()
            if requests[model] or unmap
        ]
