"""The scheduler's core: requests go in, steps and outputs come out. It does no I/O and reads no
clock but the one it is given; the scheduler process feeds it and sends what it drains.

    core.add(request)                        # or core.abort(...), core.on_result(...)
    core.schedule()
    for device, message in core.drain_device_messages(): ...  # to that device
    for rank, message in core.drain_messages(): ...   # to that attention rank's device, in order
    for output in core.drain_outputs(): ...           # to the detokenizer
    for change in core.drain_changes(): ...           # to whoever has loaded or unloaded a model
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import msgspec

from crosspool.config.deployment import Deployment
from crosspool.observability.histograms import ModelHistograms
from crosspool.scheduler.admission import Admission
from crosspool.scheduler.batching import (
    form_batch,
    lease_steps,
    leases_in_the_way,
    next_model,
    prompt_reader,
)
from crosspool.scheduler.changes import Change
from crosspool.scheduler.demand import WeightDemand
from crosspool.scheduler.fleet_control import FleetControl, FleetMessage
from crosspool.scheduler.following import Following, compiled
from crosspool.scheduler.intake import Intake
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.request import Finish, GenerateRequest, Output
from crosspool.scheduler.residency import WakeRefusal
from crosspool.scheduler.roster import Roster
from crosspool.scheduler.sequence import Sequence
from crosspool.scheduler.snapshot import snapshot
from crosspool.scheduler.validation import problem
from crosspool.transport.inspection import Snapshot
from crosspool.transport.messages import RowResult, StepResult, ToDevice


class SchedulerCore(FleetControl):
    """All logical state of a deployment: who waits, who runs where, what each rank was told.

    ``tools`` has every model of ``deployment``, by number. ``clock`` gives seconds that only grow
    (``time.monotonic``).

    Raises ConfigError when the KV pool of one attention rank holds no page of some model, and when
    the weights of a model do not fit into the pools."""

    def __init__(
        self, deployment: Deployment, tools: Mapping[int, ModelTools], clock: Callable[[], float]
    ) -> None:
        d = deployment
        self._options = d
        self._lease_steps = d.lease_steps if d.loop == "resident" else 1
        roster = Roster(d, tools, clock())
        super().__init__(roster, clock)
        self._models, self._queues, self._ranks = roster.models, roster.queues, roster.ranks
        self._intake = Intake(d, self._models, roster.bounds, clock)
        self._suspended: set[int] = set()
        self._ffn_away: set[int] = set()
        """FFN ranks that are lost and not back yet."""
        self._admission = Admission(self._queues, roster.order, self._ranks, d.max_running_requests)
        self._demand = WeightDemand(d, self._residency, self._ranks)
        self._following = Following(d.grammar_timeout)
        self._messages: list[tuple[int, ToDevice]] = []
        self._outputs: list[Output] = []
        self._changes: list[Change] = []
        self._failure: Finish | None = None

    # --- input; call schedule() afterwards

    def add(self, request: GenerateRequest) -> None:
        """Queues ``request``, or refuses it at once with an abort output: status 400 for a request
        that the model can never serve, 404 when the model leaves, 429 when its queue is full, 503
        when it sleeps and cannot be woken, the failure's status after :meth:`fail_all`. Waiting
        time counts from this call. A request that an earlier scheduler had taken goes on where it
        was; it is never refused for want of room."""
        model, served = request.model, self._models[request.model]
        queue = served.queue
        seq = self._intake.sequence(request)
        served.counters.requests += 1
        if self._failure is not None:
            return self._end(seq, self._failure)
        if not self._devices.is_served(model) and request.delivered is None:
            message = f"model {served.name} is being unloaded"
            return self._end(seq, Finish(kind="abort", message=message, status=404))
        wrong = problem(request, served.spec) or self._intake.too_large(seq)
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
                f"the queue of model {served.name} is full ({len(queue)} waiting); retry later"
            )
            return self._end(seq, self._refusal(model, message))
        if request.grammar is None:
            queue.push(seq)
        else:
            output = (request.delivered or ())[seq.stopping.reasoning_tokens :]
            queue.push_after(seq, served.tools.grammars.compile(request.grammar, output))

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

    def on_result(self, attention_rank: int, result: StepResult, steps: int = 1) -> None:
        """Takes a step's result, unless the step was lost with its rank. Raises ValueError when it
        fits no step in flight. The requests of a step that was refused wait again: for the word of
        the device that could not read the weights, or to be computed again from their tokens.

        ``steps`` above 1: as many results of one lease that goes on, each with the tokens of
        ``result``, which came one after another at even times since the clock was last read for
        one of them. A simulated device has them taken at once, while nothing else happens."""
        rank = self._ranks[attention_rank]
        if self._failure is not None or rank.is_late(result):
            return
        now = self._clock()
        if result.refused:
            self._give_back(rank.take_refusal(result), now)
            return
        flight = rank.land(result, now, steps)
        if result.more:
            self._models[flight.model].counters.step(rank.flights[flight.model], steps)
        for seq, row in zip(flight.sequences, result.rows, strict=True):
            if seq.over:
                continue
            if steps > 1:
                self._generate(seq, row.token, steps - 1, now)
            seq.append_prompt_logprobs(row.prompt)
            if row.token >= 0:
                seq.stopping.feed(row.token)
            if seq.stopping.pending:
                self._following.begin(seq, row, now)
            else:
                self._advance(seq, row, now)

    def flush(self, model: int | None = None) -> bool:
        """Gives up all cached KV (of ``model``, if given) that no running request uses; returns
        whether there is a prefix cache at all."""
        for rank in self._ranks:
            rank.promises.flush(model)
        return self._options.prefix_cache

    def suspend(self, model: int) -> None:
        """Makes no further step of ``model`` and admits none of its requests until :meth:`resume`.
        They keep their KV, can be aborted, and wait in the queue no longer than ever. Of a step in
        flight, and of one more under a lease, results still come."""
        self._suspended.add(model)
        self._demand.changed()

    def resume(self, model: int) -> None:
        """Goes on after :meth:`suspend`, if the model is suspended."""
        self._suspended.discard(model)
        self._demand.changed()

    def lose_attention_rank(self, rank: int) -> None:
        """Attention rank ``rank`` is gone with all its KV, cached prefixes and steps in flight.
        Its requests wait for a rank again, before all others and for as long as it takes; they
        are computed again from their tokens and go on with the next one."""
        self._give_back(self._ranks[rank].lose(), self._clock())
        self._messages = [(to, message) for to, message in self._messages if to != rank]

    def _give_back(self, lost: Iterable[Sequence], now: float) -> None:
        for seq in lost:
            self._queues[seq.model].give_back([seq])
            self._models[seq.model].times.lost(seq, now)

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

    # --- models whose weights come and go; ``device`` is an index into the deployment's devices

    def on_woken(self, device: int, model: int, error: str | None) -> None:
        """The device has the model's weights, or tells why it has none of them; then the model's
        requests end with status 503."""
        now = self._clock()
        if error is None:
            self._residency.woken(device, model, now)
        elif self._residency.failed(device, model, error, now):
            refusal = self._residency.refusal(model, now)
            assert refusal is not None
            self._end_model(model, self._unavailable(refusal))

    def fail_all(self, message: str, status: int = 503) -> None:
        """Aborts every request, and every later one, since a rank is gone. Nothing more is sent to
        the ranks, and results that still arrive are ignored."""
        self._failure = Finish(kind="abort", message=message, status=status)
        for seq in list(self._requests()):
            self._end(seq, self._failure)
        self._following.clear()
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
        self._change_fleet(now)
        for model in self._models.values():
            if not model.queue.compiling:
                continue
            for seq, finish in compiled(model.queue):
                if finish is not None:
                    self._end(seq, finish)
                else:
                    model.queue.push(seq)
        for seq, row, finish in self._following.settle(now):
            if finish is not None:
                self._end(seq, finish)
            else:
                self._advance(seq, row, now)
        self._follow_demand(now)
        self._refuse_expired(now)
        for rank in self._ranks:
            rank.reclaim()
            for seq in rank.extend():
                self._models[seq.model].counters.pauses += 1
        self._admit()
        for rank in self._ranks:
            self._messages += [(rank.index, release) for release in rank.releases()]
        self._launch_steps(now)
        self._demand.note_stalls(bool(self._ffn_away), now)

    def _change_fleet(self, now: float) -> None:
        """Lets go of models that leave, tells devices of changes, and takes what has changed."""
        for model, leaves_at in list(self._devices.leaving.items()):
            if leaves_at <= now:
                message = f"model {self._models[model].name} was unloaded before the request ended"
                self._end_model(model, Finish(kind="abort", message=message, status=503))
            self._residency.dismiss(model, now)
            if not self._roster.has_requests(model):
                for rank in self._ranks:
                    if rank.promises.allocator.cached_pages(model):
                        rank.promises.flush(model)
                if self._may_go(model):
                    self._devices.let_go(model)
        for change in self._roster.settle(now):
            self._suspended.discard(change.model)
            self._demand.changed()
            self._changes.append(change)
        self._device_messages += self._devices.orders(self._residency.holds)

    def _may_go(self, model: int) -> bool:
        """Whether nothing is left of a model without requests. Messages to ranks that have not been
        drained yet may be of it, and come to the devices later than those that let go of it."""
        return self._roster.is_empty(model) and not self._messages

    def _follow_demand(self, now: float) -> None:
        """Decides which models are in memory, and has devices and ranks follow."""
        work = {model for model, queue in self._queues.items() if len(queue)}
        for rank in self._ranks:
            work.update(model for model, running in rank.running.items() if running)
        work -= self._suspended
        for model, refusal in self._demand.hopeless(work, now):
            self._end_model(model, self._unavailable(refusal))
            work.discard(model)
        self._device_messages += self._demand.follow(work, self._suspended, now)

    def _end_model(self, model: int, finish: Finish) -> None:
        """Ends all requests of a model."""
        for seq in [seq for seq in self._requests() if seq.model == model]:
            self._end(seq, finish)

    def _unavailable(self, refusal: WakeRefusal) -> Finish:
        after = refusal.retry_after or self._options.queue_timeout
        return Finish(kind="abort", message=refusal.message, status=503, retry_after=after)

    def _refuse_expired(self, now: float) -> None:
        for model, queue in self._queues.items():
            while (seq := queue.oldest) is not None and seq.deadline <= now:
                self._end(seq, self._refusal(model, self._in_vain(model)))

    def _in_vain(self, model: int) -> str:
        """Why a request of ``model`` has waited in vain."""
        timeout = f"{self._options.queue_timeout:g} s"
        if model in self._suspended:
            return f"the model is paused, and did not go on within {timeout}; retry later"
        own = self.deployment.attention_ranks(model)
        if all(rank.away for rank in self._ranks if rank.index in own):
            return f"the KV pool is restarting, and was not back in {timeout}; retry later"
        if self._residency.state(model) != "resident":
            return f"the model sleeps, and could not be woken in {timeout}; retry later"
        return f"no room in the KV pool within {timeout}; retry later"

    def _refusal(self, model: int, message: str) -> Finish:
        seconds = self._queues[model].drain_seconds(self._clock())
        after = max(1.0, min(seconds, self._options.queue_timeout))
        return Finish(kind="abort", message=message, status=429, retry_after=after)

    def _admit(self) -> None:
        now = self._clock()
        for seq in self._admission.admit():
            model = self._models[seq.model]
            model.counters.admit(seq)
            self._look_at_wake(seq, now)
            model.times.admitted(seq, now)
            if not seq.replayed:
                model.rates.admitted(seq.prompt_len, seq.cached, now)
            model.queue.moved(now)
        for queue in self._queues.values():
            queue.look(now)

    def _look_at_wake(self, seq: Sequence, now: float) -> None:
        """Notes in the timeline of a request that is traced how long its model has been waking."""
        if seq.timeline is not None:
            seq.timeline.saw_wake(self._residency.latest_wake(seq.model, now), now)

    def _launch_steps(self, now: float) -> None:
        lanes = self._options.lanes
        for rank in self._ranks:
            while (model := next_model(rank, lanes)) is not None:
                running, paused = rank.running[model].values(), rank.paused[model]
                reads = prompt_reader(rank) in (None, model)
                prompt_tokens = rank.budget.tokens(model, rank.generating) if reads else 0
                batch = form_batch(running, paused, prompt_tokens)
                lease = lease_steps(rank, lanes, self._lease_steps)
                self._messages.append((rank.index, rank.launch(model, batch, now, lease)))
                self._models[model].counters.step(rank.flights[model])
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
            self._models[seq.model].counters.output_tokens += 1
            self._models[seq.model].rates.generated(now)
            self._look_at_wake(seq, now)
            self._models[seq.model].times.sampled(seq, now)
            finish = seq.append(row.token, row.output)

        if finish is not None:
            self._end(seq, finish)
        elif seq.request.stream and seq.deliverable > 0:
            self._outputs.append(seq.output(None))

    def _generate(self, seq: Sequence, token: int, count: int, now: float) -> None:
        """``seq``, which is under a lease, has sampled ``token`` this many times, and goes on."""
        model = self._models[seq.model]
        model.counters.output_tokens += count
        model.rates.generated(now, count)
        model.times.passed(seq, count, now)
        seq.repeat(token, count)

    def _end(self, seq: Sequence, finish: Finish) -> None:
        """The only way in which a request ends, whether it waits or runs."""
        seq.over = True
        if seq.rank >= 0:
            self._ranks[seq.rank].retire(seq)
        elif seq in self._models[seq.model].queue:
            self._models[seq.model].queue.remove(seq)
        now = self._clock()
        self._models[seq.model].counters.end(finish)
        self._look_at_wake(seq, now)
        self._models[seq.model].times.ended(seq, finish, now)
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

    def drain_device_messages(self) -> list[tuple[int, FleetMessage]]:
        """Pairs (device, message) since the last call; each device's are in sending order, and go
        before those of :meth:`drain_messages`."""
        messages, self._device_messages = self._device_messages, []
        return messages

    def drain_changes(self) -> list[Change]:
        """Models that have been added, refused or removed since the last call. :attr:`deployment`
        has them all."""
        changes, self._changes = self._changes, []
        return changes

    # --- state

    def next_deadline(self) -> float | None:
        """Clock time at which a waiting request is to be refused, a step becomes overdue, a grammar
        has taken too long, a model's turn is over, or one that leaves has no more time or can go,
        whichever comes first; None when none of them can happen."""
        waits = [q.oldest.deadline for q in self._queues.values() if q.oldest is not None]
        watchdog = self._options.watchdog_timeout
        running = [rank.flights.values() for rank in self._ranks if not rank.stalled]
        steps = [flight.issued + watchdog for flight in chain.from_iterable(running)]
        leave = [
            leaves_at if self._roster.has_requests(model) else self._clock()
            for model, leaves_at in self._devices.leaving.items()
            if self._roster.has_requests(model) or self._may_go(model)
        ]
        residency = self._residency.next_deadline()
        first = min(chain(waits, steps, self._following.deadlines(), leave, [residency]))
        return first if first < math.inf else None

    def overdue(self, now: float) -> str | None:
        """A message for :meth:`fail_all` when a step has had no result for ``watchdog_timeout``
        seconds, those not counted while an FFN rank was away or had to read weights again; None
        while all is well."""
        timeout = self._options.watchdog_timeout
        for rank, device in zip(self._ranks, self._options.kv_pool_devices, strict=True):
            for flight in rank.flights.values():
                if not rank.stalled and now - flight.issued >= timeout:
                    name = self._models[flight.model].name
                    return (
                        f"attention rank {rank.index} ({device.name}) has not finished step "
                        f"{flight.step} of model {name} for {timeout:g} s"
                    )
        return None

    def max_tokens(self, model: int) -> int:
        """Longest sequence of ``model`` that can ever be served, in tokens: its context, or what
        the model may have of one attention rank's KV pool."""
        return self._intake.max_tokens(model)

    def snapshot(self) -> Snapshot:
        """The state now and the counters since the start."""
        served = {number: self._models[number] for number in self._queues}
        return snapshot(
            self.deployment,
            served,
            ranks=self._ranks,
            residency=self._residency,
            leaving=[number for number in served if not self._devices.is_served(number)],
            now=self._clock(),
            max_tokens={number: self.max_tokens(number) for number in served},
            failure=self._failure.message if self._failure else None,
        )

    def histograms(self) -> list[ModelHistograms]:
        """What the requests of each model took since the start, as far as they are over. They go on
        being filled."""
        return [
            msgspec.structs.replace(
                self._models[number].times.histograms,
                model=number,
                name=self._models[number].name,
            )
            for number in sorted(self._queues)
        ]

    # --- requests

    def _requests(self) -> Iterator[Sequence]:
        """Every request that is not over."""
        yield from chain.from_iterable(self._queues.values())
        for rank in self._ranks:
            for running in rank.running.values():
                yield from running.values()
