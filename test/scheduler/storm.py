"""The simulator of faults: the scheduler's core over simulated attention and FFN ranks that crash,
hang, are slow and come back, on a virtual clock, with models that sleep and wake, come and leave;
the scheduler crashes, too, and another one gets the requests from those who have them. One seed
decides everything: the deployment, the requests, every delay and every fault. Whatever happens,
every request that no client aborts ends with exactly the tokens that it has when nothing fails,
unless its model cannot be woken or is unloaded; and of a model that has left, nothing stays.

    PYTHONPATH=test/scheduler python -m storm --seeds 10000      # or --hours 1
    PYTHONPATH=test/scheduler python -m storm --first 1234 --seeds 1 --log
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from heapq import heapify, heappop, heappush
from itertools import count
from random import Random
from typing import Any

from crosspool.config.errors import ConfigError
from crosspool.scheduler.changes import Change, ModelAdded, ModelRefused
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.request import GenerateRequest, Output
from crosspool.transport.messages import Step, StepResult, ToDevice
from simulation import WordDecoder
from storm_checks import Broken, check, require
from storm_traffic import (
    Expected,
    StormGrammars,
    StormMatcher,
    StormRank,
    expected,
    random_deployment,
    random_model,
    random_requests,
)
from storm_weights import FAILURE, REFUSAL, DeviceWeights, StormWeights

HANG_SECONDS = 4.0
"""Time until a device that hangs is noticed and killed."""
SPINS = 50
"""Turns on end that may be due at once."""
PATIENCE = 2000.0
"""Longest time from the last fault until every request has ended, in seconds of the clock."""


class Incarnation:
    """One device process with an attention rank: its rank, and when what it sent arrives."""

    def __init__(self, rank: StormRank) -> None:
        self.rank = rank
        self.alive = True
        self.hangs = False
        self.slowness = 1.0
        self.busy = False
        """Whether the end of a step is due."""
        self.last_in = self.last_out = 0.0
        """Arrival of the latest message each way; they do not overtake each other."""


class Storm:
    """One run. ``seed`` decides everything. Raises Broken when something is wrong."""

    def __init__(self, seed: int, log: bool = False) -> None:
        self.random = random = Random(seed)
        self.log = log
        self.now = 1000.0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self.done = 0
        self.counts: Counter[str] = Counter()
        d, self.specs = random_deployment(random)
        self.deployment = self.file = d
        """The deployment as the scheduler has written it last, from which processes begin."""
        self.coming: set[int] = set()
        """Models that have been loaded, but have not come."""
        self.leaving: set[int] = set()
        """Models that have been unloaded at any time."""
        self.core = self.scheduler()
        self.weights = StormWeights(self)
        self.ranks = [self.incarnation(index) for index in range(len(d.kv_pool_devices))]
        self.noticed = [True for _ in self.ranks]
        """Whether the core knows what has become of each attention rank."""
        self.ffn_away: set[int] = set()
        self.shared_device = d.weight_pool_devices[0] == d.kv_pool_devices[0]
        """Whether FFN rank 0 lives in the process of attention rank 0."""
        self.pinned = {n for n, model in d.models.items() if model.keep == "pinned"}
        """Models that have been pinned at any time."""
        self.floors = False
        """Whether a model has come that keeps memory from the others, who may then refuse requests
        that they took before."""
        self.delay = random.choice([0.001, 0.01, 0.1])
        self.step_seconds = random.choice([0.01, 0.1])
        self.requests: dict[str, GenerateRequest] = {}
        self.expected: dict[str, Expected] = {}
        self.received: dict[str, list[Output]] = defaultdict(list)
        self.open: set[str] = set()
        """Requests that have not ended."""
        self.opened: set[int] = set()
        """Seeds of requests that some rank was told of."""
        self.aborted: set[str] = set()
        self.suspended: set[int] = set()
        """Models that the clients have suspended."""
        self.handed_in: set[str] = set()
        """Requests of which nothing has come since they were handed in to another scheduler."""
        self.woken_at = 0.0
        self.spins = 0
        """Turns on end after which the next one was due at once."""
        span = random.choice([2.0, 10.0])
        self.over_at = self.now + span
        for _ in range(random.randint(1, 7)):
            self.after(random.uniform(0, span), self.arrive)
        for _ in range(random.randint(1, 5)):
            self.after(random.uniform(0, span), self.fault)
        for _ in range(random.randint(0, 2)):
            self.after(random.uniform(0, span), self.disturb)
        for _ in range(random.choice([0, 0, 1, 3])):
            self.after(random.uniform(0, span), self.change_fleet)

    def run(self) -> None:
        while self.events:
            self.now, _, what, args = heappop(self.events)
            if self.log:
                print(f"{self.now:10.3f} {what.__name__} {' '.join(map(_words, args))}")
            what(*args)
            self.done += 1
            late = self.now > self.over_at + PATIENCE
            require(not (late and self.open), "requests wait for ever", self.open)
        require(not self.open, "nothing goes on, but requests have not ended", self.open)
        for rid in self.requests:
            self.check_end(rid)
        self.count_replays()
        self.core.flush()
        self.turn()
        self.settle()
        for rank in self.ranks:
            left = rank.rank.model or any(rank.rank.mapped.values()) or rank.rank.steps
            require(not left, "a rank keeps pages or requests at the end", left)
        require(not self.coming, "a model neither comes nor is refused", self.coming)
        for model in self.served():
            self.unload(model)
        self.turn()
        self.settle()
        left = [
            *self.file.models,
            *self.core._models,
            *(n for r in self.ranks for n in r.rank.layouts),
        ]
        require(not left, "something is left of a model that has left", left)

    def settle(self) -> None:
        while self.events:
            self.now, _, what, args = heappop(self.events)
            what(*args)

    def tools(self, number: int) -> ModelTools:
        grammars = StormGrammars(self.pending, self.compiling)
        return ModelTools(spec=self.specs[number], decoder=WordDecoder(), grammars=grammars)

    def scheduler(self) -> SchedulerCore:
        tools = {number: self.tools(number) for number in self.file.models}
        return SchedulerCore(self.file, tools, lambda: self.now)

    def count_replays(self) -> None:
        for model in self.core.snapshot().models:
            self.counts["requests replayed"] += model.replayed_requests
            self.counts["tokens replayed"] += model.replayed_tokens

    def after(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        heappush(self.events, (self.now + seconds, next(self._order), what, args))

    def incarnation(self, index: int) -> Incarnation:
        specs = {number: self.specs[number] for number in self.weights.next_knows(index)}
        return Incarnation(StormRank(self.deployment, specs, lambda tokens: 0))

    def short(self) -> float:
        """A delay, rarely a long one."""
        long = self.random.random() < 0.05
        return self.random.uniform(0.1, 1) * self.delay * (50 if long else 1)

    # --- clients

    def arrive(self) -> None:
        if not self.file.models:
            return
        model = self.random.choice(sorted(self.file.models))
        made = random_requests(self.random, len(self.requests), model)
        for request in made:
            rid, spec = request.rid, self.specs[request.model]
            self.requests[rid] = request
            self.expected[rid] = expected(request, spec, self.core.max_tokens(request.model))
            self.open.add(rid)
            self.core.add(request)
            if self.random.random() < 0.1:
                self.after(self.random.uniform(0, 3), self.abort, rid)
        self.turn()

    def abort(self, rid: str) -> None:
        self.aborted.add(rid)
        self.core.abort(rid)
        self.turn()

    def disturb(self) -> None:
        """A flush, a model that is suspended for a while, or an operator's word."""
        served = self.served()
        if not served:
            return
        model = self.random.choice(served)
        kind = self.random.random()
        if kind < 0.3:
            self.core.flush(model)
        elif kind < 0.6:
            self.order(model)
        else:
            self.suspended.add(model)
            self.core.suspend(model)
            self.after(self.random.uniform(0, 5), self.resume, model)
        self.turn()

    def resume(self, model: int) -> None:
        self.suspended.discard(model)
        if model in self.file.models:
            self.core.resume(model)
        self.turn()

    def order(self, model: int) -> None:
        """An operator has the model wake, sleep, or be kept otherwise."""
        word = self.random.choice(["wake", "sleep", "wake", "sleep", "pinned", "demand", "asleep"])
        try:
            if word == "wake":
                self.core.wake(model)
            elif word == "sleep":
                self.core.sleep(model)
            else:
                self.core.pin(model, word)
                self.file = self.core.deployment
                self.pinned |= {model} if word == "pinned" else set()
        except ValueError as error:
            require("pinned" in str(error), "an operator's word is refused", error)

    # --- models that come and leave

    def change_fleet(self) -> None:
        """A model is loaded or unloaded."""
        served = self.served()
        if served and self.random.random() < 0.5:
            self.unload(self.random.choice(served))
        else:
            self.load()
        self.turn()

    def served(self) -> list[int]:
        """Models that do not leave."""
        devices = self.core._devices
        return [number for number in sorted(self.file.models) if devices.is_served(number)]

    def load(self) -> None:
        number = self.core.take_number()
        self.file = self.core.deployment  # so that a later scheduler does not give it again
        require(number not in self.specs, "a number is used again", number)
        config, self.specs[number] = random_model(self.random, f"model{number}", self.deployment)
        try:
            self.core.add_model(number, config, self.tools(number))
        except ConfigError as error:
            require("_bytes" in str(error), "a model is refused", error)
            self.counts["loads that do not fit"] += 1
            return
        self.coming.add(number)
        self.weights.know(number, self.file.with_model(number, config), self.specs)
        self.pinned |= {number} if config.keep == "pinned" else set()
        self.floors |= bool(config.kv_floor_bytes)

    def unload(self, model: int) -> None:
        self.leaving.add(model)
        self.core.remove_model(model, self.random.choice([0.0, 1.0, 1e4]))

    def changed(self, change: Change) -> None:
        """The scheduler writes the file anew."""
        self.file = self.core.deployment
        self.coming.discard(change.model)
        if isinstance(change, ModelAdded):
            self.counts["models come"] += 1
        elif isinstance(change, ModelRefused):
            require(change.error == REFUSAL, "a model is refused", change.error)
            self.counts["models refused"] += 1
        else:
            require(change.model in self.leaving, "a model leaves by itself", change)
            self.counts["models leave"] += 1

    # --- grammars

    def compiling(self, future: Future[Any], matcher: StormMatcher) -> None:
        def compiled() -> None:
            if not future.cancelled():
                future.set_result(matcher)
            self.turn()

        self.after(self.random.choice([0.0, self.random.uniform(0, 2)]), compiled)

    def pending(self, matcher: StormMatcher) -> None:
        def followed() -> None:
            matcher.pending = False
            self.turn()

        self.after(self.random.choice([0.001, self.random.uniform(0, 3)]), followed)

    # --- the scheduler process

    def turn(self) -> None:
        """What the scheduler's loop does after each message."""
        overdue = self.core.overdue(self.now)
        require(overdue is None, "the server would end", overdue)
        self.core.schedule()
        for device, order in self.core.drain_device_messages():
            self.weights.send(device, order)
        for rank, message in self.core.drain_messages():
            self.send(rank, message)
        for output in self.core.drain_outputs():
            self.take(output)
        for change in self.core.drain_changes():
            self.changed(change)
        check(self)
        deadline = self.core.next_deadline()
        self.spins = self.spins + 1 if deadline is not None and deadline <= self.now else 0
        require(self.spins < SPINS, "the scheduler is woken again and again", deadline)
        if deadline is not None and not self.now < self.woken_at <= deadline:
            self.woken_at = deadline
            self.after(max(0.0, deadline - self.now), self.wake)

    def wake(self) -> None:
        self.turn()

    def send(self, index: int, message: ToDevice) -> None:
        to = self.ranks[index]
        if isinstance(message, Step):
            state = self.core._residency.state(message.model)
            require(state in ("waking", "resident"), "a step of a model that sleeps", message.model)
            self.counts["early steps"] += state == "waking"
        socket = self.weights.processes[self.weights.attention[index]]
        to.last_in = max(to.last_in, socket.last_in, self.now + self.short())
        socket.last_in = to.last_in
        self.after(to.last_in - self.now, self.deliver, index, to, message)

    def take(self, output: Output) -> None:
        rid, before = output.rid, self.received[output.rid]
        require(rid in self.open, "output after a request's end", rid)
        if rid in self.handed_in:
            output = self.without_known(output)
        require(output.first == (not before), "a first output that is not the first", rid)
        had = sum(len(o.token_ids) for o in before)
        told = output.completion_tokens - len(output.token_ids)
        require(told >= had, "a token is delivered twice", rid)
        require(told <= had, "a token is missing", rid)
        want = self.expected[rid].tokens[had : output.completion_tokens]
        if output.token_ids != want:
            twice = had and output.token_ids[:1] == self.expected[rid].tokens[had - 1 : had]
            raise Broken("a token is delivered twice" if twice else "a wrong token", rid)
        before.append(output)
        if output.finish is not None:
            self.open.discard(rid)
        self.counts["tokens"] += len(output.token_ids)

    def without_known(self, output: Output) -> Output:
        """The first output of another scheduler without what the client has."""
        self.handed_in.discard(output.rid)
        before = self.received[output.rid]
        had = [token for earlier in before for token in earlier.token_ids]
        require(output.first, "the first output of another scheduler is not whole", output.rid)
        require(output.token_ids[: len(had)] == had, "a token changes", output.rid)
        repeated = bool(had) and bool(output.prompt_logprobs)
        require(not repeated, "the prompt's log-probabilities come twice", output.rid)
        return dataclasses.replace(output, first=not before, token_ids=output.token_ids[len(had) :])

    def check_end(self, rid: str) -> None:
        """What came out of a request that has ended is what it must yield."""
        outputs, want, r = self.received[rid], self.expected[rid], self.requests[rid]
        finish = outputs[-1].finish
        assert finish is not None
        if finish.kind == "abort":
            if finish.status in (400, 429):
                admitted = r.sampling.seed in self.opened
                require(not admitted, "an admitted request is refused", finish)
                narrow = self.floors and "of KV cache" in finish.message
                require(finish.status == 429 or narrow, "a request is refused", finish)
            elif finish.status in (404, 503) and "unloaded" in finish.message:
                require(r.model in self.leaving, "a request is refused", finish)
                self.counts["unloaded"] += 1
                return
            elif finish.status == 503:
                broken = r.model in self.weights.failed and FAILURE in finish.message
                crowded = self.pinned and "models that are pinned" in finish.message
                require(broken or crowded, "a request is refused", finish)
            else:
                require(rid in self.aborted, "a request is aborted", finish)
            self.counts["aborted" if finish.status != 503 else "refused"] += 1
            return
        tokens = [token for output in outputs for token in output.token_ids]
        require((tokens, finish) == (want.tokens, want.finish), "a request ends wrongly", rid)
        if r.logprobs.output:
            found = [p.logprob for output in outputs for p in output.output_logprobs]
            if tokens:
                require(found == want.logprobs, "a log-probability is wrong", rid)
        start = r.logprobs.prompt_start
        prompt = [(p.token, p.logprob) for p in outputs[0].prompt_logprobs]
        positions = range(start, len(r.input_ids)) if start >= 0 else range(0)
        right = [(r.input_ids[p], -float(p) if p else None) for p in positions]
        require(prompt == right, "the prompt's log-probabilities are wrong", (rid, prompt))
        self.counts["finished"] += 1

    # --- attention ranks

    def deliver(self, index: int, to: Incarnation, message: ToDevice) -> None:
        if not to.alive:
            return
        if isinstance(message, Step):
            self.opened |= {opened.sampling.seed for opened in message.opens}
        to.rank.receive(message)
        self.work(index, to)

    def work(self, index: int, it: Incarnation) -> None:
        """Has the next step of the rank end after its time."""
        if it.alive and not (it.busy or it.hangs or self.ffn_away) and self.ready(index, it):
            it.busy = True
            seconds = self.step_seconds * it.slowness * self.random.uniform(0.2, 1)
            self.after(seconds, self.end_step, index, it)

    def ready(self, index: int, it: Incarnation) -> list[int]:
        """The places of the rank's steps, among those on its lanes, that can end now."""
        steps = it.rank.steps[: self.deployment.lanes]
        gates = [self.weights.gate(index, step.model) for step in steps]
        return [place for place, gate in enumerate(gates) if gate != "waits"]

    def end_step(self, index: int, it: Incarnation) -> None:
        it.busy = False
        if not it.alive or it.hangs or self.ffn_away:
            return
        ready = self.ready(index, it)
        if not ready:
            return
        place = self.random.choice(ready)
        if self.weights.gate(index, it.rank.steps[place].model) == "open":
            result = it.rank.answer(place)
        else:
            result = it.rank.refuse(place)
            self.counts["steps refused"] += 1
        it.last_out = max(it.last_out, self.now + self.short())
        self.after(it.last_out - self.now, self.arrived, index, it, result)
        self.counts["steps"] += 1
        self.work(index, it)

    def arrived(self, index: int, it: Incarnation, result: StepResult) -> None:
        if not it.alive and self.random.random() < 0.3:
            it.last_out = float("inf")  # this one is lost, and so are all that follow
        if it.last_out == float("inf"):
            return
        self.core.on_result(index, result)
        self.turn()

    # --- faults

    def fault(self) -> None:
        kinds = [self.crash, self.crash, self.hang, self.slow, self.crash_ffn, self.crash_ffn]
        self.random.choice([*kinds, self.crash_scheduler])()

    def crash_scheduler(self) -> None:
        """The scheduler dies, and with it all devices and what is on the way to the clients."""
        self.counts["scheduler losses"] += 1
        self.count_replays()
        of_clients = (self.arrive, self.fault, self.disturb, self.resume, self.abort)
        of_clients += (self.change_fleet,)
        self.events = [event for event in self.events if event[2] in of_clients]
        heapify(self.events)
        for it in self.ranks:
            it.alive = False
        self.weights.read_early.clear()
        self.ranks = [self.incarnation(index) for index in range(len(self.ranks))]
        self.noticed = [True for _ in self.ranks]
        self.ffn_away.clear()
        self.woken_at = 0.0
        self.coming.clear()
        self.core = self.scheduler()
        for device in self.weights.devices:
            self.weights.come_back(device)
        for model in self.suspended & self.file.models.keys():
            self.core.suspend(model)
        self.handed_in = set(self.open)
        for rid in [rid for rid in self.requests if rid in self.open]:
            outputs = self.received[rid]
            del outputs[self.random.randint(max(0, len(outputs) - 2), len(outputs)) :]
            had = tuple(token for output in outputs for token in output.token_ids)
            self.core.add(dataclasses.replace(self.requests[rid], delivered=had))
            if rid in self.aborted:
                self.core.abort(rid)
        self.turn()

    def crash(self) -> None:
        index = self.random.randrange(len(self.ranks))
        self.kill(index, self.random.choice([0.0, self.random.uniform(0, 0.5)]))

    def hang(self) -> None:
        index = self.random.randrange(len(self.ranks))
        self.ranks[index].hangs = True
        self.kill(index, HANG_SECONDS, alive=True)

    def kill(self, index: int, noticed_after: float, alive: bool = False) -> None:
        it = self.ranks[index]
        if not it.alive or not self.noticed[index]:
            return
        it.alive = alive
        self.weights.die(index)
        self.noticed[index] = False
        self.counts["attention losses"] += 1
        if self.shared_device and index == 0 and 0 not in self.ffn_away:
            self.ffn_away.add(0)
        self.after(noticed_after, self.notice, index)

    def notice(self, index: int) -> None:
        self.ranks[index].alive = False
        self.core.lose_attention_rank(index)
        self.core.lose_device(index)
        if self.shared_device and index == 0:
            self.core.lose_ffn_rank(0)
        if self.random.random() < 0.2:  # the next process dies while it loads
            self.after(self.random.uniform(0, 3), self.notice, index)
            self.counts["losses while away"] += 1
        else:
            away = self.random.choice([2.0, 40.0])
            self.after(self.random.uniform(0, away), self.come_back, index)
        self.turn()

    def come_back(self, index: int) -> None:
        self.ranks[index] = self.incarnation(index)
        self.noticed[index] = True
        self.core.restore_attention_rank(index)
        if self.shared_device and index == 0:
            self.ffn_away.discard(0)
            self.core.restore_ffn_rank(0)
        self.weights.come_back(index)
        if self.random.random() < 0.15 and self.now < self.over_at:
            self.after(self.random.uniform(0, 0.3), self.kill, index, 0.1)
        self.turn()
        self.go_on()

    def slow(self) -> None:
        self.random.choice(self.ranks).slowness = self.random.choice([3.0, 30.0])

    def crash_ffn(self) -> None:
        self.kill_ffn(self.random.randrange(len(self.weights.ffn)))

    def kill_device(self, device: int) -> None:
        """The device dies whose index this is."""
        if device < len(self.ranks):
            self.kill(device, self.random.choice([0.0, 0.3]))
        else:
            self.kill_ffn(self.weights.ffn.index(device))

    def kill_ffn(self, index: int) -> None:
        if index in self.ffn_away or (index == 0 and self.shared_device):
            return
        self.ffn_away.add(index)
        self.weights.die(self.weights.ffn[index])
        self.counts["FFN losses"] += 1
        self.after(self.random.choice([0.0, HANG_SECONDS]), self.notice_ffn, index)

    def notice_ffn(self, index: int) -> None:
        self.core.lose_ffn_rank(index)
        self.core.lose_device(self.weights.ffn[index])
        if self.random.random() < 0.2:
            self.after(self.random.uniform(0, 3), self.notice_ffn, index)
        else:
            away = self.random.choice([1.0, 100.0])  # longer than the watchdog waits
            self.after(self.random.uniform(0, away), self.ffn_back, index)
        self.turn()

    def ffn_back(self, index: int) -> None:
        self.ffn_away.discard(index)
        self.core.restore_ffn_rank(index)
        self.weights.come_back(self.weights.ffn[index])
        self.turn()
        self.go_on()

    def go_on(self) -> None:
        for index, it in enumerate(self.ranks):
            self.work(index, it)


class Failure(AssertionError):
    """A seed at which something is wrong; the message tells the seed and what."""


def run(seed: int, log: bool = False) -> Storm:
    """Runs one storm. Raises Failure with the seed, the number of the event and what is wrong."""
    storm = Storm(seed, log)
    try:
        storm.run()
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        raise Failure(f"seed {seed}, event {storm.done}: {error or line}") from error
    return storm


def _words(argument: object) -> str:
    """An event's argument for the log."""
    if isinstance(argument, Step):
        rows = [f"{row.request}[{row.start}+{len(row.tokens)}]" for row in argument.rows]
        return f"step {argument.step} of model {argument.model}: {' '.join(rows)}"
    if isinstance(argument, Incarnation):
        return "alive" if argument.alive else "dead"
    if isinstance(argument, DeviceWeights):
        return f"with {sorted(argument.has)}"
    return str(argument)


def main() -> int:
    parser = argparse.ArgumentParser(prog="storm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--first", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--seeds", type=int, help="number of seeds; 1000 where no time is given")
    parser.add_argument("--hours", type=float, help="go on for so long")
    parser.add_argument("--log", action="store_true", help="print every event")
    flags = parser.parse_args()
    seeds = flags.seeds or (1 << 62 if flags.hours else 1000)
    start, counts = time.process_time(), Counter[str]()
    end = time.monotonic() + 3600 * (flags.hours or 1e6)
    for seed in range(flags.first, flags.first + seeds):
        if time.monotonic() > end:
            break
        try:
            storm = run(seed, flags.log)
        except Failure as failure:
            print(failure, file=sys.stderr)
            return 1
        counts += storm.counts + Counter(seeds=1, events=storm.done)
    seconds = time.process_time() - start
    print(", ".join(f"{number:,} {name}" for name, number in sorted(counts.items())))
    print(f"{seconds:.0f} s of processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
