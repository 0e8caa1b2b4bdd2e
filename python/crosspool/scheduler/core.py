"""The scheduler's core: requests go in, steps and outputs come out. It does no I/O and reads no
clock but the one it is given; the scheduler process feeds it and sends what it drains.

    core.add(request)                        # or core.abort(...), core.on_result(...)
    core.schedule()
    for device, message in core.drain_device_messages(): ...  # Wake and Sleep, to that device
    for rank, message in core.drain_messages(): ...   # to that attention rank's device, in order
    for output in core.drain_outputs(): ...           # to the detokenizer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from itertools import chain

from crosspool.config.deployment import Deployment
from crosspool.config.options import Keep
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.admission import Admission
from crosspool.scheduler.batching import (
    form_batch,
    lease_steps,
    leases_in_the_way,
    next_model,
    prompt_reader,
)
from crosspool.scheduler.budgets import Budgets
from crosspool.scheduler.chunk_budget import chunk_budget
from crosspool.scheduler.counters import ModelCounters
from crosspool.scheduler.intake import Intake
from crosspool.scheduler.promises import Promises
from crosspool.scheduler.protocols import GrammarBackend, TextDecoder
from crosspool.scheduler.queue_order import queue_order
from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.rates import ModelRates
from crosspool.scheduler.request import Finish, GenerateRequest, Output
from crosspool.scheduler.residency import ResidencyPolicy, WakeRefusal
from crosspool.scheduler.sequence import Sequence
from crosspool.scheduler.snapshot import snapshot
from crosspool.scheduler.validation import problem
from crosspool.scheduler.worth import HALF_LIFE_PER_MODEL, RecentRate
from crosspool.transport.inspection import Snapshot
from crosspool.transport.messages import RowResult, Sleep, StepResult, ToDevice, Wake
from crosspool.weightpool.placement import initially_resident


class SchedulerCore:
    """All logical state of a deployment: who waits, who runs where, what each rank was told.

    ``specs``, ``decoders`` and ``grammars`` have one entry for each model of ``deployment``, in its
    order. ``clock`` gives seconds that only grow (``time.monotonic``). ``think_ends`` has the
    tokens with which each model's thinking ends; they are empty where nothing tells its end.

    Raises ConfigError when the KV pool of one attention rank holds no page of some model, and when
    the weights of a model do not fit into the pools."""

    def __init__(
        self,
        deployment: Deployment,
        specs: Seq[ModelSpec],
        decoders: Seq[TextDecoder],
        grammars: Seq[GrammarBackend],
        clock: Callable[[], float],
        *,
        think_ends: Seq[tuple[int, ...]] | None = None,
    ) -> None:
        d = deployment
        self._deployment = d
        self._specs = specs
        self._grammars = grammars
        self._clock = clock
        self._lease_steps = d.lease_steps if d.loop == "resident" else 1
        self._names = [model.name for model in d.models]
        layouts = [KVLayout(spec, d.page_size, d.chunk_bytes) for spec in specs]
        bounds = Bounds.of(d)
        self._intake = Intake(
            d,
            specs=specs,
            decoders=decoders,
            layouts=layouts,
            bounds=bounds,
            think_ends=think_ends or [()] * len(specs),
            clock=clock,
        )
        self._suspended: set[int] = set()
        self._ffn_away: set[int] = set()
        """FFN ranks that are lost and not back yet."""
        self._ranks = [
            RankState(
                index,
                Promises(d, bounds, layouts),
                layouts,
                chunk_budget(d),
            )
            for index in range(len(d.kv_pool_devices))
        ]
        self._queues = [WaitingQueue(d.max_queued_requests) for _ in specs]
        self._admission = Admission(
            self._queues, queue_order(d), self._ranks, d.max_running_requests
        )
        self._residency = ResidencyPolicy(
            Budgets.of(d, specs),
            dict(enumerate(d.models)),
            initially_resident(d, specs),
            quantum=d.residency_quantum,
            worth=RecentRate(HALF_LIFE_PER_MODEL * len(specs)),
            now=clock(),
        )
        self._attention_devices = [d.devices.index(device) for device in d.kv_pool_devices]
        self._barred_at = -1
        """The residency's version at which the ranks were told which models make no steps; -1 when
        they are to be told again."""
        self._counters = [ModelCounters() for _ in specs]
        self._rates = [ModelRates() for _ in specs]
        self._messages: list[tuple[int, ToDevice]] = []
        self._device_messages: list[tuple[int, Wake | Sleep]] = []
        self._outputs: list[Output] = []
        self._undecided: list[tuple[Sequence, RowResult, float]] = []
        """Requests whose grammar follows a token: with its row, and clock time since when."""
        self._failure: Finish | None = None

    # --- input; call schedule() afterwards

    def add(self, request: GenerateRequest) -> None:
        """Queues ``request``, or refuses it at once with an abort output: status 400 for a request
        that the model can never serve, 429 when its queue is full, 503 when the model sleeps and
        cannot be woken, the failure's status after :meth:`fail_all`. Waiting time counts from this
        call. A request that an earlier scheduler had taken goes on where it was; it is never
        refused for want of room."""
        model = request.model
        spec, queue = self._specs[model], self._queues[model]
        seq = self._intake.sequence(request)
        self._counters[model].requests += 1
        if self._failure is not None:
            return self._end(seq, self._failure)
        wrong = problem(request, spec) or self._intake.too_large(seq)
        if wrong is not None:
            return self._end(seq, Finish(kind="abort", message=wrong, status=400))
        if request.delivered is not None and (finish := seq.resume()) is not None:
            return self._end(seq, finish)
        if (refusal := self._residency.refusal(model, self._clock())) is not None:
            return self._end(seq, self._unavailable(refusal))
        if not request.is_probe:
            self._residency.used(model, self._clock())
        if queue.full and not seq.replayed:
            self._admit()
        if queue.full and not seq.replayed:
            message = (
                f"the queue of model {self._names[model]} is full ({len(queue)} waiting); "
                "retry later"
            )
            return self._end(seq, self._refusal(model, message))
        if request.grammar is None:
            queue.push(seq)
        else:
            output = (request.delivered or ())[seq.stopping.reasoning_tokens :]
            queue.push_after(seq, self._grammars[model].compile(request.grammar, output))

    def abort(
        self,
        rid: str,
        model: int | None = None,
        message: str = "the client aborted the request",
    ) -> None:
        """Ends with status 499 the request of this ``rid`` (each model's, if no ``model`` is
        given). What it has sampled so far is delivered; the result of its step in flight is
        dropped."""
        finish = Finish(kind="abort", message=message, status=499)
        for seq in list(self._requests()):
            if model in (None, seq.model) and seq.request.rid == rid:
                self._end(seq, finish)

    def on_result(self, attention_rank: int, result: StepResult) -> None:
        """Takes a step's result, unless the step was lost with its rank. Raises ValueError when it
        fits no step in flight. The requests of a step that was refused wait again: for the word of
        the device that could not read the weights, or to be computed again from their tokens."""
        rank = self._ranks[attention_rank]
        if self._failure is not None or rank.is_late(result):
            return
        now = self._clock()
        if result.refused:
            for seq in rank.take_refusal(result):
                self._queues[seq.model].give_back([seq])
            return
        flight = rank.land(result, now)
        if result.more:
            self._counters[flight.model].step(rank.flights[flight.model])
        for seq, row in zip(flight.sequences, result.rows, strict=True):
            if seq.over:
                continue
            seq.append_prompt_logprobs(row.prompt)
            if row.token >= 0:
                seq.stopping.feed(row.token)
            if seq.stopping.pending:
                seq.undecided = True
                self._undecided.append((seq, row, now))
            else:
                self._advance(seq, row, now)

    def flush(self, model: int | None = None) -> bool:
        """Gives up all cached KV (of ``model``, if given) that no running request uses; returns
        whether there is a prefix cache at all."""
        for rank in self._ranks:
            rank.promises.flush(model)
        return self._deployment.prefix_cache

    def suspend(self, model: int) -> None:
        """Makes no further step of ``model`` and admits none of its requests until :meth:`resume`.
        They keep their KV, can be aborted, and wait in the queue no longer than ever. Of a step in
        flight, and of one more under a lease, results still come."""
        self._suspended.add(model)
        self._barred_at = -1

    def resume(self, model: int) -> None:
        """Goes on after :meth:`suspend`, if the model is suspended."""
        self._suspended.discard(model)
        self._barred_at = -1

    def lose_attention_rank(self, rank: int) -> None:
        """Attention rank ``rank`` is gone with all its KV, cached prefixes and steps in flight.
        Its requests wait for a rank again, before all others and for as long as it takes; they
        are computed again from their tokens and go on with the next one."""
        for seq in self._ranks[rank].lose():
            self._queues[seq.model].give_back([seq])
        self._messages = [(to, message) for to, message in self._messages if to != rank]

    def restore_attention_rank(self, rank: int) -> None:
        """Attention rank ``rank``, which was lost, is back; it knows nothing."""
        self._ranks[rank].restore()

    def lose_ffn_rank(self, rank: int) -> None:
        """FFN rank ``rank`` is gone. Steps that need it stand still until it is back, and then go
        on where they were; until then none counts as overdue, and what steps take tells nothing
        about the chunks that the target time allows."""
        self._ffn_away.add(rank)
        for attention_rank in self._ranks:
            attention_rank.stalled = True

    def restore_ffn_rank(self, rank: int) -> None:
        """FFN rank ``rank``, which was lost, is back. Steps that it held up count as issued when
        the next :meth:`schedule` is called."""
        self._ffn_away.discard(rank)

    # --- models that sleep and wake; ``device`` is an index into the deployment's devices

    def wake(self, model: int) -> None:
        """Wakes the model in its turn, requests or not. Raises ValueError, with a text for users,
        when it does not fit beside the pinned models."""
        self._residency.wake(model, self._clock())

    def sleep(self, model: int) -> None:
        """Has the model sleep as soon as it has no requests; its next request wakes it. Raises
        ValueError, with a text for users, for a pinned model."""
        self._residency.sleep(model, self._clock())

    def pin(self, model: int, keep: Keep) -> None:
        """Changes when the model is in memory: ``pinned`` wakes it, ``asleep`` has it sleep. Raises
        ValueError, with a text for users, when the pinned models do not fit together."""
        self._residency.pin(model, keep, self._clock())

    def on_waking(self, device: int, model: int, read: int, total: int) -> None:
        """The device has read ``read`` of ``total`` bytes of the model's weights."""
        self._residency.reading(device, model, read, total)

    def on_woken(self, device: int, model: int, error: str | None) -> None:
        """The device has the model's weights, or tells why it has none of them; then the model's
        requests end with status 503."""
        now = self._clock()
        if error is None:
            self._residency.woken(device, model, now)
        elif self._residency.failed(device, model, error, now):
            refusal = self._residency.refusal(model, now)
            assert refusal is not None
            self._end_all(model, refusal)

    def on_slept(self, device: int, model: int) -> None:
        """The device has given up the model's weights."""
        self._residency.slept(device, model)

    def lose_device(self, device: int) -> None:
        """The device is gone; to be called beside what is called for its ranks."""
        self._residency.lose(device)
        self._device_messages = [(to, m) for to, m in self._device_messages if to != device]

    def restore_device(self, device: int, resident: Collection[int]) -> None:
        """The device is there, with the weights of the models in ``resident``; it is told to read
        what it should have besides. To be called beside what is called for its ranks."""
        self._residency.restore(device, resident, self._clock())

    def fail_all(self, message: str, status: int = 503) -> None:
        """Aborts every request, and every later one, since a rank is gone. Nothing more is sent to
        the ranks, and results that still arrive are ignored."""
        self._failure = Finish(kind="abort", message=message, status=status)
        for seq in list(self._requests()):
            self._end(seq, self._failure)
        self._undecided.clear()
        for rank in self._ranks:
            rank.flights.clear()
        self._messages.clear()
        self._device_messages.clear()

    # --- scheduling

    def schedule(self) -> None:
        """Does everything that is possible now. To be called after each of the calls above, at
        :meth:`next_deadline`, and when a grammar's future or a matcher's work is done."""
        if self._failure is not None:
            return
        now = self._clock()
        self._queue_compiled()
        self._decide(now)
        self._follow_demand(now)
        self._refuse_expired(now)
        for rank in self._ranks:
            rank.reclaim()
            for seq in rank.extend():
                self._counters[seq.model].pauses += 1
        self._admit()
        for rank in self._ranks:
            self._messages += [(rank.index, release) for release in rank.releases()]
        self._launch_steps(now)
        self._note_stalls(now)

    def _queue_compiled(self) -> None:
        for queue in self._queues:
            for seq, compiled in queue.take_compiled():
                grammar, error = seq.request.grammar, compiled.exception()
                assert grammar is not None
                if error is not None:
                    message = f"the {grammar.kind} {grammar.source[:200]!r} cannot be used: {error}"
                    self._end(seq, Finish(kind="abort", message=message, status=400))
                elif (finish := seq.stopping.follow(compiled.result())) is not None:
                    self._end(seq, finish)
                else:
                    queue.push(seq)

    def _decide(self, now: float) -> None:
        """Goes on with requests whose grammar has followed their token, and ends those whose
        grammar has not for too long."""
        undecided, self._undecided = self._undecided, []
        timeout = self._deployment.grammar_timeout
        for seq, row, since in undecided:
            if seq.over:
                continue
            if not seq.stopping.pending:
                seq.undecided = False
                self._advance(seq, row, now)
            elif now - since < timeout:
                self._undecided.append((seq, row, since))
            else:
                message = (
                    "the grammar has not told which token may come next within the server's "
                    f"`grammar_timeout`, {timeout:g} s; make it less ambiguous"
                )
                self._end(seq, Finish(kind="abort", message=message, status=400))

    def _follow_demand(self, now: float) -> None:
        """Decides which models are in memory, and has devices and ranks follow."""
        work = {model for model, queue in enumerate(self._queues) if len(queue)}
        for rank in self._ranks:
            work.update(model for model, running in enumerate(rank.running) if running)
        work -= self._suspended
        for model in sorted(work):
            if (refusal := self._residency.refusal(model, now)) is not None:
                self._end_all(model, refusal)
                work.discard(model)
        self._residency.decide(work, now)
        in_flight = {model for rank in self._ranks for model in rank.flights}
        self._device_messages += self._residency.orders(in_flight)
        policy = self._residency
        if self._barred_at != policy.version:
            self._barred_at = policy.version
            for rank, device in zip(self._ranks, self._attention_devices, strict=True):
                early = policy.early(device) - self._suspended
                rank.bar((policy.barred(device) | self._suspended) - early, early)

    def _note_stalls(self, now: float) -> None:
        """Notes which ranks have steps that wait for weights or for an FFN rank."""
        for rank, device in zip(self._ranks, self._attention_devices, strict=True):
            if self._ffn_away or self._residency.stand_still(device, rank.flights):
                rank.stalled = True
            elif rank.stalled:
                rank.unstall(now)

    def _end_all(self, model: int, refusal: WakeRefusal) -> None:
        """Ends all requests of a model that cannot be woken."""
        for seq in [seq for seq in self._requests() if seq.model == model]:
            self._end(seq, self._unavailable(refusal))

    def _unavailable(self, refusal: WakeRefusal) -> Finish:
        after = refusal.retry_after or self._deployment.queue_timeout
        return Finish(kind="abort", message=refusal.message, status=503, retry_after=after)

    def _refuse_expired(self, now: float) -> None:
        for model, queue in enumerate(self._queues):
            while (seq := queue.oldest) is not None and seq.deadline <= now:
                self._end(seq, self._refusal(model, self._in_vain(model)))

    def _in_vain(self, model: int) -> str:
        """Why a request of ``model`` has waited in vain."""
        timeout = f"{self._deployment.queue_timeout:g} s"
        if model in self._suspended:
            return f"the model is paused, and did not go on within {timeout}; retry later"
        if all(rank.away for rank in self._ranks):
            return f"the KV pool is restarting, and was not back in {timeout}; retry later"
        if self._residency.state(model) != "resident":
            return f"the model sleeps, and could not be woken in {timeout}; retry later"
        return f"no room in the KV pool within {timeout}; retry later"

    def _refusal(self, model: int, message: str) -> Finish:
        seconds = self._queues[model].drain_seconds(self._clock())
        after = max(1.0, min(seconds, self._deployment.queue_timeout))
        return Finish(kind="abort", message=message, status=429, retry_after=after)

    def _admit(self) -> None:
        now = self._clock()
        for seq in self._admission.admit():
            self._counters[seq.model].admit(seq)
            if not seq.replayed:
                self._rates[seq.model].admitted(seq.prompt_len, seq.cached, now)
            self._queues[seq.model].moved(now)
        for queue in self._queues:
            queue.look(now)

    def _launch_steps(self, now: float) -> None:
        lanes = self._deployment.lanes
        for rank in self._ranks:
            while (model := next_model(rank, lanes)) is not None:
                running, paused = rank.running[model].values(), rank.paused[model]
                reads = prompt_reader(rank) in (None, model)
                prompt_tokens = rank.budget.tokens(model, rank.generating) if reads else 0
                batch = form_batch(running, paused, prompt_tokens)
                lease = lease_steps(rank, lanes, self._lease_steps)
                self._messages.append((rank.index, rank.launch(model, batch, now, lease)))
                self._counters[model].step(rank.flights[model])
            for flight in leases_in_the_way(rank, lanes):
                self._messages.append((rank.index, rank.recall(flight)))

    def _advance(self, seq: Sequence, row: RowResult, now: float) -> None:
        finish = None
        if seq.prefill_only:
            if row.output is not None:
                seq.append_next(row.output)
            if seq.decoding:
                finish = Finish(kind="length")
        elif row.token >= 0:
            self._counters[seq.model].output_tokens += 1
            self._rates[seq.model].generated(now)
            finish = seq.append(row.token, row.output)

        if finish is not None:
            self._end(seq, finish)
        elif seq.request.stream and seq.deliverable > 0:
            self._outputs.append(seq.output(None))

    def _end(self, seq: Sequence, finish: Finish) -> None:
        """The only way in which a request ends, whether it waits or runs."""
        seq.over = True
        if seq.rank >= 0:
            self._ranks[seq.rank].retire(seq)
        elif seq in self._queues[seq.model]:
            self._queues[seq.model].remove(seq)
        self._counters[seq.model].end(finish)
        self._outputs.append(seq.output(finish))

    # --- output

    def drain_messages(self) -> list[tuple[int, ToDevice]]:
        """Pairs (attention rank, message) since the last call; each rank's are in sending order."""
        messages, self._messages = self._messages, []
        return messages

    def drain_outputs(self) -> list[Output]:
        """Outputs since the last call; each request's are in order, its last with ``finish``."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def drain_device_messages(self) -> list[tuple[int, Wake | Sleep]]:
        """Pairs (device, message) since the last call; each device's are in sending order."""
        messages, self._device_messages = self._device_messages, []
        return messages

    # --- state

    def next_deadline(self) -> float | None:
        """Clock time at which a waiting request is to be refused, a step becomes overdue, a grammar
        has taken too long or a model's turn is over, whichever comes first; None when none of them
        can happen."""
        waits = [q.oldest.deadline for q in self._queues if q.oldest is not None]
        watchdog = self._deployment.watchdog_timeout
        running = [rank.flights.values() for rank in self._ranks if not rank.stalled]
        steps = [flight.issued + watchdog for flight in chain.from_iterable(running)]
        grammars = [since + self._deployment.grammar_timeout for _, _, since in self._undecided]
        first = min(chain(waits, steps, grammars, [self._residency.next_deadline()]))
        return first if first < math.inf else None

    def overdue(self, now: float) -> str | None:
        """A message for :meth:`fail_all` when a step has had no result for ``watchdog_timeout``
        seconds, those not counted while an FFN rank was away or had to read weights again; None
        while all is well."""
        timeout = self._deployment.watchdog_timeout
        for rank, device in zip(self._ranks, self._deployment.kv_pool_devices, strict=True):
            for flight in rank.flights.values():
                if not rank.stalled and now - flight.issued >= timeout:
                    return (
                        f"attention rank {rank.index} ({device.name}) has not finished step "
                        f"{flight.step} of model {self._names[flight.model]} for {timeout:g} s"
                    )
        return None

    def max_tokens(self, model: int) -> int:
        """Longest sequence of ``model`` that can ever be served, in tokens: its context, or what
        the model may have of one attention rank's KV pool."""
        return self._intake.max_tokens(model)

    def snapshot(self) -> Snapshot:
        """The state now and the counters since the start."""
        return snapshot(
            self._deployment,
            self._specs,
            queues=self._queues,
            ranks=self._ranks,
            counters=self._counters,
            rates=self._rates,
            residency=self._residency,
            now=self._clock(),
            max_tokens=[self.max_tokens(model) for model in range(len(self._specs))],
            failure=self._failure.message if self._failure else None,
        )

    # --- requests

    def _requests(self) -> Iterator[Sequence]:
        """Every request that is not over."""
        yield from chain.from_iterable(self._queues)
        for rank in self._ranks:
            for running in rank.running:
                yield from running.values()
