"""The scheduler's picture of one attention rank: who runs there, and which steps are in flight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count

from crosspool.kvpool.layout import KVLayout
from crosspool.scheduler.chunk_budget import ChunkBudget
from crosspool.scheduler.flight import StepInFlight
from crosspool.scheduler.promises import Promises
from crosspool.scheduler.sequence import Sequence
from crosspool.transport.messages import Open, Recall, Release, Row, Step, StepResult


class RankState:
    def __init__(
        self, index: int, promises: Promises, layouts: list[KVLayout], budget: ChunkBudget
    ) -> None:
        self.index = index
        self.promises = promises
        self.budget = budget
        self.running: list[dict[int, Sequence]] = [{} for _ in layouts]
        """Per model the requests that run here, by number, in order of admission."""
        self.paused: list[dict[int, Sequence]] = [{} for _ in layouts]
        """Those of them that wait for further pages."""
        self.flights: dict[int, StepInFlight] = {}
        """Steps in flight by model: one each."""
        self.last_step = [-1] * len(layouts)
        """Per model the number of its latest step."""
        self.last_prompt_step = [-1] * len(layouts)
        """Per model the number of its latest step that took prompt tokens."""
        self.delayed: set[int] = set()
        """Models whose requests have waited for a prompt chunk and not had a token since."""
        self.version = 0
        """Changes whenever somebody may be promised pages to whom they were refused before."""
        self._layouts = layouts
        self._step_numbers = count()
        self._ended: list[Sequence] = []
        self._forget: dict[int, list[int]] = defaultdict(list)
        """Per model the requests that the rank is still to be told to forget."""
        self._asked = -1
        """The version at which the paused requests last asked in vain."""

    # --- who comes, and who goes on

    def admit(self, seq: Sequence) -> bool:
        """Nobody comes in while somebody who is in waits for pages."""
        if any(self.paused) or not self.promises.admit(seq):
            return False
        seq.rank = self.index
        self.running[seq.model][seq.number] = seq
        return True

    def extend(self) -> Iterator[Sequence]:
        """Promises further pages to those who have filled theirs, first admitted first, or pauses
        them; yields each that is paused from now on."""
        if not self.promises.rule.grows:
            return
        for running, paused in zip(self.running, self.paused, strict=True):
            for seq in running.values():
                if seq.decoding and not seq.in_flight and seq.number not in paused:
                    if self.promises.holds(seq, seq.computed + 1):
                        continue
                    if self.promises.extend(seq):
                        self.version += 1
                    else:
                        paused[seq.number] = seq
                        yield seq
        while any(self.paused) and self._asked != self.version:
            self._asked = self.version
            waiting = [seq for paused in self.paused for seq in paused.values()]
            for seq in sorted(waiting, key=lambda seq: seq.number):
                if self.promises.extend(seq):
                    del self.paused[seq.model][seq.number]
                    self.version += 1

    # --- steps

    @property
    def generating(self) -> set[int]:
        """Models of which a request wants its next token, not its first."""
        return {
            model
            for model, running in enumerate(self.running)
            if any(
                seq.has_output and seq.number not in self.paused[model] for seq in running.values()
            )
        }

    def launch(
        self, model: int, batch: Iterable[tuple[Sequence, int]], now: float, lease_steps: int
    ) -> Step:
        """Makes the step that takes so many further tokens of each request in ``batch``, with a
        lease of ``lease_steps`` at most."""
        batch = list(batch)
        lease = self._lease(model, batch, lease_steps)
        sequences: list[Sequence] = []
        opens: list[Open] = []
        rows: list[Row] = []
        map_chunks: list[int] = []
        for seq, tokens in batch:
            if not seq.opened:
                opens.append(seq.open())
            pages = self._layouts[model].pages_for(seq.computed + tokens + lease - 1)
            pages = max(pages, seq.pages_sent)  # an earlier lease may have reached further
            if pages > seq.pages_sent:
                map_chunks += self.promises.allocator.map(model, seq.pages[seq.pages_sent : pages])
            rows.append(seq.next_row(tokens, pages))
            sequences.append(seq)
        number = next(self._step_numbers)
        self.last_step[model] = number
        self.budget.share_out(self.flights.values(), now)
        flight = self.flights[model] = StepInFlight(number, model, now, sequences, rows, lease)
        if flight.prompt_tokens:
            self.last_prompt_step[model] = number
        return Step(
            step=number, model=model, map_chunks=map_chunks, opens=opens, rows=rows, lease=lease
        )

    def _lease(self, model: int, batch: list[tuple[Sequence, int]], most: int) -> int:
        """For how many steps everybody in ``batch`` may go on, by pages and by length."""
        for seq, tokens in batch:
            known = len(seq.tokens)
            if not seq.leasable or seq.computed + tokens < known:
                return 1
            slots = len(seq.pages) * self._layouts[model].page_size
            most = min(most, seq.limit - known, slots - known + 1)
        return max(most, 1)

    def recall(self, flight: StepInFlight) -> Recall:
        """Ends the lease of ``flight``; steps of it may be answered yet."""
        self.flights[flight.model] = replace(flight, recalled=True)
        return Recall(step=flight.step)

    def land(self, result: StepResult, now: float) -> StepInFlight:
        """The step that ``result`` answers; the next of its lease takes its place. Raises
        ValueError when it answers none, or not every row of it."""
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
        if result.more and flight.lease == 1:
            raise ValueError(f"attention rank {self.index} outdid the lease of step {result.step}")
        self.budget.share_out(self.flights.values(), now)
        self.budget.landed(flight)
        del self.flights[flight.model]
        if result.more:
            rows = [
                Row(
                    request=row.request,
                    start=row.start + len(row.tokens),
                    tokens=[answer.token],
                    pages=[],
                    sample=True,
                )
                for row, answer in zip(flight.rows, result.rows, strict=True)
            ]
            self.flights[flight.model] = replace(
                flight, issued=now, rows=rows, lease=flight.lease - 1
            )
        if flight.prompt_tokens:
            self.delayed = self.generating
        self.delayed.discard(flight.model)
        for seq, row in zip(flight.sequences, flight.rows, strict=True):
            seq.in_flight = result.more
            if seq.over:
                if not result.more:
                    self._ended.append(seq)
                continue
            if row.start < seq.prompt_len == seq.computed and self.promises.share(seq):
                self.version += 1
            if result.more:
                seq.computed += 1
        return flight

    # --- who leaves

    def retire(self, seq: Sequence) -> None:
        """``seq`` runs no more; its pages are given back after its step in flight, if any."""
        del self.running[seq.model][seq.number]
        self.paused[seq.model].pop(seq.number, None)
        self.version += 1
        if not seq.in_flight:
            self._ended.append(seq)

    def reclaim(self) -> None:
        """Takes back the pages of every request that has ended."""
        for seq in self._ended:
            if seq.opened:
                self._forget[seq.model].append(seq.number)
            self.promises.take_back(seq)
            self.version += 1
        self._ended.clear()

    def releases(self) -> list[Release]:
        """What the rank has to be told since the last call."""
        forget, self._forget = self._forget, defaultdict(list)
        unmap = self.promises.chunks_to_unmap()
        return [
            Release(model=model, requests=forget[model], unmap_chunks=unmap[model])
            for model in range(len(self._layouts))
            if forget[model] or unmap[model]
        ]
