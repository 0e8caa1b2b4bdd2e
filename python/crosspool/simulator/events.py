"""A deployment over simulated time: the scheduler's own core, over devices that take the time that
the cost table has for them.

Residency, admission, batches, prompt chunks, leases, prefix cache and promises are the core's. What
is simulated is what devices, links and hosts do: :mod:`crosspool.simulator.engine`.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import msgspec

from crosspool.config.deployment import Deployment
from crosspool.config.errors import ConfigError
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.request import GenerateRequest, Grammar, StopRules
from crosspool.simulator.costs import CostTable
from crosspool.simulator.engine import Landing, SimulatedEngine
from crosspool.simulator.requests import DeviceLoss, RequestOutcome, SimulatedRequest
from crosspool.transport.messages import Release, Sampling, Sleep, Wake

_SAMPLING = Sampling(temperature=0.0)
_MOST_AT_ONCE = 100_000
"""Times that the clock may stand still: more are a mistake in the simulator."""


@dataclass
class Simulated:
    """What came of a workload."""

    outcomes: list[RequestOutcome]
    """Those of the requests, in their order."""
    gaps: dict[int, Gaps]
    """Times between tokens, by model."""
    seconds: float = 0.0
    """Time at which the last request was over."""
    busy: list[float] = field(default_factory=list)
    """Seconds that each device worked, in the deployment's order."""
    wakes: int = 0
    woken_bytes: int = 0
    steps: int = 0
    """Steps that ended."""
    turns: int = 0
    """Times that the core was called upon to schedule."""


class Gaps:
    """Times between tokens, with how often each was seen."""

    def __init__(self) -> None:
        self.seconds = array("d")
        self.times = array("q")

    def add(self, seconds: float, times: int = 1) -> None:
        self.seconds.append(seconds)
        self.times.append(times)


class _Text:
    """No request has stop strings or a grammar."""

    def decode(self, ids: list[int]) -> str:
        raise AssertionError("a simulated request has no text")

    def compile(self, grammar: Grammar, output: Sequence[int] = ()) -> Future[Any]:
        raise AssertionError("a simulated request has no grammar")


def simulate(
    deployment: Deployment,
    specs: Mapping[int, ModelSpec],
    costs: CostTable,
    requests: Sequence[SimulatedRequest],
    *,
    losses: Iterable[DeviceLoss] = (),
    told: Callable[[int], None] = lambda over: None,
) -> Simulated:
    """Serves ``requests``, which are in the order of their arrivals, until all are over. ``specs``
    has every model of the deployment, by number. ``told`` is called now and then with how many are.

    Raises ConfigError for models that fit into no pool, or of which the table has no costs, and for
    a loss of a device that there is not."""
    simulation = _Simulation(deployment, specs, costs, requests, told=told)
    simulation.plan(losses)
    return simulation.run()


class _Simulation:
    def __init__(
        self,
        deployment: Deployment,
        specs: Mapping[int, ModelSpec],
        costs: CostTable,
        requests: Sequence[SimulatedRequest],
        *,
        told: Callable[[int], None],
    ) -> None:
        self._now = 0.0
        self._deployment, self._host = deployment, costs.host
        text = _Text()
        tools = {n: ModelTools(spec=spec, decoder=text, grammars=text) for n, spec in specs.items()}
        self._core = SchedulerCore(deployment, tools, lambda: self._now)
        self._engine = SimulatedEngine(deployment, specs, costs)
        self._requests, self._told = requests, told
        self._found = Simulated(
            outcomes=[RequestOutcome() for _ in requests],
            gaps={number: Gaps() for number in deployment.models},
        )
        self._over = 0
        self._running: dict[tuple[int, int], RequestOutcome] = {}
        """Outcomes of the requests that run, by attention rank and the scheduler's number."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def run(self) -> Simulated:
        host, requests = self._host, self._requests
        arrivals = [r.arrival + host.arrival + host.arrival_token * r.prompt for r in requests]
        order = sorted(range(len(requests)), key=arrivals.__getitem__)
        place, still = 0, 0
        deadline: float | None = None
        while True:
            arrival = arrivals[order[place]] if place < len(order) else math.inf
            event = self._events[0][0] if self._events else math.inf
            own = self._engine.next_time(self._now)
            due = math.inf if deadline is None else deadline
            now = max(self._now, min(arrival, event, own, due))
            if now == math.inf or (self._over == len(requests) and arrival == math.inf):
                break
            still = still + 1 if now == self._now else 0
            assert still < _MOST_AT_ONCE, "the simulated clock stands still"
            landings, woken = self._engine.advance(now)
            acts = any(not landing.result.more for landing in landings) or bool(woken)
            for landing in landings:
                self._land(landing)
            self._now = now
            for device, model in woken:
                self._core.on_woken(device, model, None)
            while self._events and self._events[0][0] <= now:
                heapq.heappop(self._events)[2]()
                acts = True
            while place < len(order) and arrivals[order[place]] <= now:
                self._arrive(order[place])
                place += 1
                acts = True
            if acts or due <= now:
                self._schedule()
                deadline = self._core.next_deadline()
        found, engine = self._found, self._engine
        found.seconds = max((o.end for o in found.outcomes if o.status), default=0.0)
        found.busy, found.wakes = engine.busy, engine.wakes
        found.woken_bytes = engine.woken_bytes
        return found

    # --- requests

    def _arrive(self, place: int) -> None:
        request = self._requests[place]
        self._core.add(
            GenerateRequest(
                rid=str(place),
                model=request.model,
                input_ids=request.tokens(place),
                sampling=msgspec.structs.replace(_SAMPLING, seed=place),
                stop=StopRules(max_new_tokens=request.output, ignore_eos=True),
            )
        )

    def _land(self, landing: Landing) -> None:
        """Tells the core of steps that have ended, and notes the tokens."""
        result, steps, rank = landing.result, landing.steps, landing.rank
        first = landing.time - (steps - 1) * landing.gap
        gaps = self._found.gaps[landing.model]
        yielded = 0
        for row in result.rows:
            if row.token < 0:
                continue
            outcome = self._running.get((rank, row.request))
            if outcome is None:
                continue
            if outcome.tokens:
                gaps.add(first - outcome.last)
            else:
                outcome.first = first
            outcome.tokens += steps
            outcome.last = landing.time
            yielded += 1
        if steps > 1 and yielded:
            gaps.add(landing.gap, (steps - 1) * yielded)
        self._found.steps += steps
        if steps > 1 and not result.more:
            going = msgspec.structs.replace(result, more=True)
            self._now = max(self._now, landing.time - landing.gap)
            self._core.on_result(rank, going, steps - 1)
            steps = 1
        self._now = max(self._now, landing.time)
        self._core.on_result(rank, result, steps)

    def _schedule(self) -> None:
        core, engine = self._core, self._engine
        core.schedule()
        self._found.turns += 1
        for device, order in core.drain_device_messages():
            assert isinstance(order, Wake | Sleep), "models do not come and go here"
            engine.order(device, order, self._now)
            if isinstance(order, Sleep):
                core.on_slept(device, order.model)
                self._at(self._now, lambda: None)
        for rank, message in core.drain_messages():
            if isinstance(message, Release):
                engine.forget(rank, message.requests)
                for request in message.requests:
                    self._running.pop((rank, request), None)
            else:
                engine.receive(rank, message, self._now)
                for opened in getattr(message, "opens", ()):
                    outcome = self._found.outcomes[opened.sampling.seed]
                    self._running[rank, opened.request] = outcome
        for output in core.drain_outputs():
            if output.finish is not None:
                self._end(int(output.rid), output.finish.status)

    def _end(self, place: int, status: int) -> None:
        host, outcome = self._host, self._found.outcomes[place]
        outcome.status = status
        if status == 200:
            outcome.end = outcome.last + host.first_token + host.end
            outcome.first += host.first_token
            outcome.last += host.first_token
        else:
            outcome.end = self._now
        self._over += 1
        if self._over % 1000 == 0:
            self._told(self._over)

    # --- events

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), act))

    def plan(self, losses: Iterable[DeviceLoss]) -> None:
        """Has devices be lost and come back. Raises ConfigError for one that there is not."""
        names = [device.name for device in self._deployment.devices]
        for loss in losses:
            if loss.device not in names:
                raise ConfigError(
                    f"--lose {loss.device}: there is no such device, only {', '.join(names)}"
                )
            device = names.index(loss.device)
            self._at(loss.at, partial(self._lose, device))
            self._at(loss.at + loss.seconds, partial(self._restore, device))

    def _ranks(self, device: int) -> tuple[list[int], list[int]]:
        """The attention ranks and the FFN ranks of a device."""
        d = self._deployment
        attention, ffn = (
            [rank for rank, own in enumerate(pool) if d.devices.index(own) == device]
            for pool in (d.kv_pool_devices, d.weight_pool_devices)
        )
        return attention, ffn

    def _lose(self, device: int) -> None:
        self._engine.lose(device)
        self._core.lose_device(device)
        attention, ffn = self._ranks(device)
        for rank in attention:
            self._running = {key: of for key, of in self._running.items() if key[0] != rank}
            self._core.lose_attention_rank(rank)
        for rank in ffn:
            self._core.lose_ffn_rank(rank)

    def _restore(self, device: int) -> None:
        self._engine.restore(device)
        models = list(self._deployment.models)
        self._core.restore_device(device, models, self._engine.has[device])
        attention, ffn = self._ranks(device)
        for rank in attention:
            self._core.restore_attention_rank(rank)
        for rank in ffn:
            self._core.restore_ffn_rank(rank)
