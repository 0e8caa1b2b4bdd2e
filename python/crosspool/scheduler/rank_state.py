"""What the scheduler knows of one attention rank: its requests, and its steps in flight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count

from crosspool.kvpool.layout import KVLayout
from crosspool.scheduler.chunk_budget import ChunkBudget
from crosspool.scheduler.flight import StepInFlight
from crosspool.scheduler.promises import Promises
from crosspool.scheduler.sequence import Sequence
from crosspool.transport.messages import Open, Recall, Release, Row, Step, StepResult


class RankState:
    """Numbers: ``model`` is the model's in the deployment, a request's is ``Sequence.number``, a
    step's is counted by the rank."""

    def __init__(
        self,
        index: int,
        promises: Promises,
        layouts: Mapping[int, KVLayout],
        budget: ChunkBudget,
    ) -> None:
        self.index = index
        self.promises = promises
        self.budget = budget
        self.away = False
        """Whether the rank is lost and not back yet."""
        self.stalled = False
        """Whether an FFN rank is away or weights have yet to be read, so that steps may not end."""
        self.barred: frozenset[int] = frozenset()
        """Models that make no steps here for now, as they are suspended or not awake. None of their
        requests is admitted; those that run stay as they are."""
        self.early: frozenset[int] = frozenset()
        """Models that may make a step here, though some of their weights are yet to be read."""
        self.running: dict[int, dict[int, Sequence]] = {model: {} for model in layouts}
        """Requests that run here, indexed [model][number], in order of admission."""
        self.paused: dict[int, dict[int, Sequence]] = {model: {} for model in layouts}
        """Running requests that wait for more pages, indexed [model][number]."""
        self.flights: dict[int, StepInFlight] = {}
        """The step in flight of each model that has one."""
        self.last_step = dict.fromkeys(layouts, -1)
        """Number of each model's latest step; -1 before its first."""
        self.last_prompt_step = dict.fromkeys(layouts, -1)
        """Number of each model's latest step that took prompt tokens; -1 before its first."""
        self.delayed: set[int] = set()
        """Models whose requests have waited for a prompt chunk and not had a token since."""
        self.version = 0
        """Changes whenever a request that was refused pages before might get them now."""
        self.busy_seconds = 0.0
        """Seconds of all steps that have ended, added up."""
        self._layouts = layouts
        self._step_numbers = count()
        self._first_step = 0
        """Number from which steps belong to the rank as it is since it was last lost."""
        self._first_measured = 0
        """Number from which no step has seen an FFN rank away."""
        self._ended: list[Sequence] = []
        self._forget: dict[int, list[int]] = defaultdict(list)
        """Requests of each model that the rank has yet to be told to forget."""
        self._asked = -1
        """The version at which the paused requests last asked in vain."""

    # --- models that come and go

    def add_model(self, model: int) -> None:
        """A further model comes, which has a layout. Raises ConfigError when the budget holds no
        page of it."""
        self.promises.add_model(model)
        self.running[model], self.paused[model] = {}, {}
        self.last_step[model] = self.last_prompt_step[model] = -1

    def has_left(self, model: int) -> bool:
        """Whether nothing of the model is left here: no request, step, page or chunk, and nothing
        that the rank has yet to be told of it."""
        return not (
            self.running[model]
            or model in self.flights
            or any(seq.model == model for seq in self._ended)
            or self._forget.get(model)
            or self.promises.holds_any(model)
        )

    def remove_model(self, model: int) -> None:
        """A model goes, of which nothing is left."""
        self.promises.remove_model(model)
        for by_model in (self.running, self.paused, self.last_step, self.last_prompt_step):
            del by_model[model]
        self.delayed.discard(model)
        self.budget.forget(model)
        self.version += 1

    # --- ranks that go and come back

    def lose(self) -> list[Sequence]:
        """The rank is gone with every page, cached prefix and step. Returns the requests that ran
        here; they have forgotten it."""
        self.away = True
        for flight in self.flights.values():
            self.budget.dropped(flight)
        lost = [seq for running in self.running.values() for seq in running.values()]
        for seq in lost:
            seq.lose_rank()
        for requests in (*self.running.values(), *self.paused.values()):
            requests.clear()
        self.flights.clear()
        self.delayed.clear()
        self._ended.clear()
        self._forget.clear()
        self._first_step = next(self._step_numbers)
        self.promises.forget()
        self.version += 1
        return lost

    def restore(self) -> None:
        """The rank is back and knows nothing."""
        self.away = False
        self.version += 1

    def is_late(self, result: StepResult) -> bool:
        """Whether ``result`` is of a step that was lost."""
        return result.step < self._first_step

    def unstall(self, now: float) -> None:
        """No FFN rank is away any more. Steps in flight count as issued ``now``, and what they take
        tells nothing."""
        self.stalled = False
        self._first_measured = next(self._step_numbers)
        for model, flight in self.flights.items():
            self.flights[model] = replace(flight, issued=now)

    def bar(self, models: frozenset[int], early: frozenset[int]) -> None:
        """From now on, ``models`` make no steps here, and those of ``early`` hold a lane until the
        rest of their weights is read."""
        if models != self.barred:
            self.version += 1
        self.barred, self.early = models, early

    # --- admission and promises

    def admit(self, seq: Sequence) -> bool:
        """Admits ``seq`` if it can be promised pages; nobody is admitted while a running request
        waits for pages."""
        if any(self.paused.values()) or not self.promises.admit(seq):
            return False
        seq.rank = self.index
        self.running[seq.model][seq.number] = seq
        return True

    def extend(self) -> Iterator[Sequence]:
        """Promises more pages to requests that have filled theirs, in order of admission, or pauses
        them; yields each request that is paused from now on."""
        if not self.promises.rule.grows:
            return
        for model, running in self.running.items():
            paused = self.paused[model]
            for seq in running.values():
                if seq.decoding and not seq.in_flight and seq.number not in paused:
                    if self.promises.holds(seq, seq.computed + 1):
                        continue
                    if self.promises.extend(seq):
                        self.version += 1
                    else:
                        paused[seq.number] = seq
                        yield seq
        while any(self.paused.values()) and self._asked != self.version:
            self._asked = self.version
            waiting = [seq for paused in self.paused.values() for seq in paused.values()]
            for seq in sorted(waiting, key=lambda seq: seq.number):
                if self.promises.extend(seq):
                    del self.paused[seq.model][seq.number]
                    self.version += 1

    # --- steps

    @property
    def generating(self) -> set[int]:
        """Models with a request that has output and waits for its next token, and weights."""
        return {
            model
            for model, running in self.running.items()
            if running
            and model not in self.barred
            and model not in self.early
            and any(
                seq.has_output and not seq.undecided and seq.number not in self.paused[model]
                for seq in running.values()
            )
        }

    def launch(
        self, model: int, batch: Iterable[tuple[Sequence, int]], now: float, lease_steps: int
    ) -> Step:
        """Makes the next step of ``model``: ``batch`` has the requests and how many tokens the step
        takes of each; the lease is ``lease_steps`` at most."""
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
        """Number of steps, ``most`` at most, for which every request in ``batch`` has pages and may
        grow longer."""
        for seq, tokens in batch:
            known = len(seq.tokens)
            if not seq.leasable or seq.computed + tokens < known:
                return 1
            slots = self._layouts[model].tokens_in(len(seq.pages))
            most = min(most, seq.limit - known, slots - known + 1)
        return max(most, 1)

    def recall(self, flight: StepInFlight) -> Recall:
        """Ends the lease of ``flight``; results of some more of its steps may still come."""
        self.flights[flight.model] = replace(flight, recalled=True)
        return Recall(step=flight.step)

    def land(self, result: StepResult, now: float, steps: int = 1) -> StepInFlight:
        """Returns the step that ``result`` belongs to, which ends; the next step of its lease takes
        its place, or the last of ``steps`` that have ended. Raises ValueError when ``result`` fits
        no step in flight, or not its rows."""
        flight = self._flight_of(result)
        asked = [(row.request, row.sample) for row in flight.rows]
        got = [(row.request, row.token >= 0) for row in result.rows]
        if asked != got:
            raise ValueError(
                f"attention rank {self.index} sent rows (request, sampled) {got} as the result of "
                f"step {result.step}, which has {asked}"
            )
        if result.more and flight.lease <= steps:
            raise ValueError(
                f"attention rank {self.index} goes on with step {result.step}, whose lease is over"
            )
        self.budget.share_out(self.flights.values(), now)
        self.busy_seconds += now - flight.issued
        if self.stalled or flight.step < self._first_measured:
            self.budget.dropped(flight)
        else:
            self.budget.landed(flight, steps)
        del self.flights[flight.model]
        if result.more:
            rows = [
                Row(
                    request=row.request,
                    start=row.start + len(row.tokens) + steps - 1,
                    tokens=[done.token],
                    pages=[],
                    sample=True,
                )
                for row, done in zip(flight.rows, result.rows, strict=True)
            ]
            self.flights[flight.model] = replace(
                flight, issued=now, rows=rows, lease=flight.lease - steps
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
            end = row.start + len(row.tokens)
            if row.start < seq.prompt_len <= end and self.promises.share(seq):
                self.version += 1
            if result.more:
                seq.computed += steps
        return flight

    def _flight_of(self, result: StepResult) -> StepInFlight:
        flight = next((f for f in self.flights.values() if f.step == result.step), None)
        if flight is None:
            raise ValueError(
                f"attention rank {self.index} sent a result of unknown step {result.step}"
            )
        return flight

    def take_refusal(self, result: StepResult) -> list[Sequence]:
        """The step of ``result`` was not made, since weights are missing. Returns its requests,
        which run no more; they and the rank have forgotten each other. Raises ValueError when
        ``result`` fits no step in flight."""
        flight = self._flight_of(result)
        self.budget.dropped(flight)
        del self.flights[flight.model]
        self.delayed.discard(flight.model)
        self.version += 1
        returned = []
        for seq, row in zip(flight.sequences, flight.rows, strict=True):
            seq.computed = row.start
            self.promises.take_back(seq)
            if not seq.over:
                del self.running[seq.model][seq.number]
                returned.append(seq)
            seq.lose_rank()
        return returned

    # --- the end of requests

    def retire(self, seq: Sequence) -> None:
        """``seq`` stops running; its pages are taken back after its step in flight, if any."""
        del self.running[seq.model][seq.number]
        self.paused[seq.model].pop(seq.number, None)
        self.version += 1
        if not seq.in_flight:
            self._ended.append(seq)

    def reclaim(self) -> None:
        """Takes back the pages of every request that has ended and is in no step."""
        for seq in self._ended:
            if seq.opened:
                self._forget[seq.model].append(seq.number)
            self.promises.take_back(seq)
            self.version += 1
        self._ended.clear()

    def releases(self) -> list[Release]:
        """What to tell the rank about requests and chunks given up since the last call."""
        forget, self._forget = self._forget, defaultdict(list)
        unmap = self.promises.chunks_to_unmap()
        return [
            Release(model=model, requests=forget[model], unmap_chunks=unmap[model])
            for model in sorted({*forget, *unmap})
            if forget[model] or unmap[model]
        ]
