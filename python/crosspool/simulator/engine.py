"""Simulated devices: they take the scheduler's messages, and end steps after the time that the cost
table has for them. Nothing is decided here; what is told is done, in order.

A step that is one of a lease is followed by the next one on the same lane. As long as nothing else
happens, many of these steps are ended at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from crosspool.config.deployment import Deployment
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.budgets import Budgets
from crosspool.simulator.costs import CostTable, Curve, ShapeCosts
from crosspool.simulator.pace import StepLoad, cycles
from crosspool.transport.messages import Recall, RowResult, Sleep, Step, StepResult, Wake
from crosspool.weightpool.placement import initially_resident

_ROUNDING = 1e-9
"""Part of a step by which it may end early, as floats are not exact."""


class _Model:
    """The costs of a model, as curves."""

    def __init__(self, costs: ShapeCosts) -> None:
        self.costs = costs
        self.attention = Curve(costs.attention)
        self.ffn = Curve(costs.ffn)
        self.head = Curve(costs.head)


@dataclass(eq=False)
class _Work:
    """A step on its way: on a lane, behind others, or on the way to the device."""

    rank: int
    model: int
    step: int
    lease: int
    """Steps that it may make, this one included."""
    results: list[RowResult]
    tokens: int
    sampled: int
    earlier: int
    """Tokens before those of decoding rows, added up."""
    ends_at: int
    """Tokens up to the end of all rows, added up."""
    chunk_pairs: float
    """Pairs of a prompt chunk's token and a token before it."""
    start: float
    """Time at which it may begin."""
    recalled: bool = False
    missing: set[int] = field(default_factory=set)
    """Devices that it waits for: they read its weights, or are lost."""
    load: StepLoad | None = None
    since: float = 0.0
    """Time at which ``left`` was true."""
    left: float = 1.0
    """Part of the step that is not done."""
    seconds: float = math.inf
    """What the whole step takes at the pace of now; without end while it waits."""

    @property
    def goes_on(self) -> bool:
        """Whether another step of the lease follows this one."""
        return self.lease > 1 and not self.recalled

    @property
    def decodes(self) -> bool:
        """Whether it has no prompt chunk, so that the steps of its lease are alike."""
        return self.tokens == len(self.results) and not self.chunk_pairs

    @property
    def ends(self) -> float:
        return self.since + self.left * self.seconds if self.left else self.since


@dataclass(frozen=True)
class Landing:
    """Results of one step, or of several of one lease, which ended one after another."""

    rank: int
    model: int
    result: StepResult
    steps: int
    time: float
    """Time at which the last of them ended."""
    gap: float
    """Seconds between the ends of two of them."""


class SimulatedEngine:
    """All devices of a deployment; ``device`` is an index into its devices."""

    def __init__(
        self, deployment: Deployment, specs: Mapping[int, ModelSpec], costs: CostTable
    ) -> None:
        d = deployment
        self._lanes = d.lanes
        self._costs = costs
        self._models = {n: _Model(costs.of(config.name)) for n, config in d.models.items()}
        self._own = [d.devices.index(device) for device in d.kv_pool_devices]
        self._ffn = {
            model: [d.devices.index(d.weight_pool_devices[rank]) for rank in d.ffn_ranks(model)]
            for model in d.models
        }
        self._places = Budgets.of(d, specs).places
        self._resident = initially_resident(d, specs)
        self.has = [
            {m for m in self._resident if self._bytes(device, m)}
            for device in range(len(d.devices))
        ]
        """Models of which each device has all its weights."""
        self._lost: set[int] = set()
        self._at_work: list[list[_Work]] = [[] for _ in self._own]
        self._behind: list[deque[_Work]] = [deque() for _ in self._own]
        self._coming: list[_Work] = []
        self._opened: dict[tuple[int, int], int] = {}
        """Prompt tokens of each request, by rank and request."""
        self._reading: dict[int, deque[tuple[float, int]]] = {}
        """Wakes of each device in order: when they end, and the model."""
        self._changed = False
        """Whether the pace is to be found anew."""
        self.busy = [0.0] * len(d.devices)
        """Seconds that each device has worked."""
        self.wakes = 0
        self.woken_bytes = 0

    # --- messages

    def receive(self, rank: int, message: object, now: float) -> None:
        """Takes a message of the scheduler to an attention rank."""
        if isinstance(message, Step):
            self._coming.append(self._work(rank, message, now + self._costs.host.turn))
        elif isinstance(message, Recall):
            works = (*self._at_work[rank], *self._behind[rank], *self._coming)
            for work in works:
                if work.rank == rank and work.step == message.step:
                    work.recalled = True

    def _work(self, rank: int, step: Step, start: float) -> _Work:
        earlier, ends_at, tokens, sampled, pairs = 0, 0, 0, 0, 0.0
        for opened in step.opens:
            self._opened[rank, opened.request] = opened.prompt_len
        for row in step.rows:
            count = len(row.tokens)
            tokens += count
            ends_at += row.start + count
            sampled += row.sample
            if count == 1 and row.start >= self._opened[rank, row.request]:
                earlier += row.start
            else:
                pairs += count * (row.start + count / 2)
        results = [RowResult(request=r.request, token=0 if r.sample else -1) for r in step.rows]
        needed = {*self._ffn[step.model], self._own[rank]}
        missing = {
            device
            for device in needed
            if device in self._lost
            or (self._bytes(device, step.model) and step.model not in self.has[device])
        }
        return _Work(
            rank=rank,
            model=step.model,
            step=step.step,
            lease=step.lease,
            results=results,
            tokens=tokens,
            sampled=sampled,
            earlier=earlier,
            ends_at=ends_at,
            chunk_pairs=pairs,
            start=start,
            missing=missing,
        )

    def forget(self, rank: int, requests: list[int]) -> None:
        """Requests are over."""
        for request in requests:
            self._opened.pop((rank, request), None)

    def order(self, device: int, message: Wake | Sleep, now: float) -> None:
        """Takes an order to wake a model or to have it sleep; the latter is done at once."""
        if isinstance(message, Sleep):
            self.has[device].discard(message.model)
            return
        queue = self._reading.setdefault(device, deque())
        begin = max(now, queue[-1][0] if queue else now)
        nbytes = self._bytes(device, message.model)
        self.wakes += 1
        self.woken_bytes += nbytes
        seconds = self._costs.wake + nbytes / self._costs.wake_bytes_per_s
        queue.append((begin + seconds, message.model))

    def _bytes(self, device: int, model: int) -> int:
        return sum(spot.held.get(model, 0) for spot in self._places if spot.device == device)

    # --- devices that go and come back

    def lose(self, device: int) -> None:
        """The device is gone with its steps; steps of others that need it stand still."""
        self._lost.add(device)
        self._reading.pop(device, None)
        for rank, own in enumerate(self._own):
            if own == device:
                self._at_work[rank].clear()
                self._behind[rank].clear()
                self._coming = [work for work in self._coming if work.rank != rank]
        for work in self._all():
            if device in self._ffn[work.model]:
                work.missing.add(device)
        self._changed = True

    def restore(self, device: int) -> None:
        """The device is back, with the weights that it had."""
        self._lost.discard(device)
        for work in self._all():
            if work.model in self.has[device] or not self._bytes(device, work.model):
                work.missing.discard(device)
        self._changed = True

    def _all(self) -> list[_Work]:
        return [
            *self._coming,
            *(work for lanes in (*self._at_work, *self._behind) for work in lanes),
        ]

    # --- time

    def next_time(self, now: float) -> float:
        """Time of the next thing that happens here; infinite without one."""
        if self._changed:
            self._find_pace(now)
        first = math.inf
        for rank, works in enumerate(self._at_work):
            behind = self._behind[rank]
            for work in works:
                ends = work.ends
                if work.goes_on and work.decodes and not behind:
                    ends += (work.lease - 1) * work.seconds
                first = min(first, ends)
        for work in self._coming:
            first = min(first, work.start)
        for queue in self._reading.values():
            first = min(first, queue[0][0])
        return first

    def advance(self, now: float) -> tuple[list[Landing], list[tuple[int, int]]]:
        """Goes on to ``now``, which is no later than :meth:`next_time`. Returns the steps that have
        ended, in the order of their times, and pairs (device, model) that have been woken."""
        if self._changed:
            self._find_pace(now)
        landings: list[Landing] = []
        for rank, works in enumerate(self._at_work):
            for work in tuple(works):
                if work.ends <= now + _ROUNDING * min(work.seconds, 1.0):
                    landings.append(self._end(rank, work, now))
        landings.sort(key=lambda landing: landing.time)
        for work in [work for work in self._coming if work.start <= now]:
            self._coming.remove(work)
            self._behind[work.rank].append(work)
        woken = self._woken(now)
        for rank, behind in enumerate(self._behind):
            works = self._at_work[rank]
            while behind and len(works) < self._lanes:
                work = behind.popleft()
                work.since, work.left = now, 1.0
                works.append(work)
                self._changed = True
        return landings, woken

    def _end(self, rank: int, work: _Work, now: float) -> Landing:
        """Ends one step of ``work``, or as many of its lease as are over."""
        first = work.ends
        goes_on = work.goes_on
        steps = 1
        if goes_on and work.decodes and not self._behind[rank]:
            steps += int((now - first) / work.seconds + _ROUNDING)
        steps = min(steps, work.lease)
        time = min(first + (steps - 1) * work.seconds, now)
        more = goes_on and steps < work.lease
        self._count(work, steps)
        if more:
            work.lease -= steps
            reads = bool(self._models[work.model].costs.decode_read)
            self._changed |= reads or not work.decodes
            # The rows' next tokens are those that they have just yielded.
            work.earlier = work.ends_at + (steps - 1) * len(work.results)
            work.ends_at = work.earlier + len(work.results)
            work.tokens, work.chunk_pairs = len(work.results), 0.0
            work.since, work.left = time, 1.0
        if not more or self._behind[rank]:
            self._at_work[rank].remove(work)
            self._changed = True
            if more:
                self._behind[rank].append(work)
        result = StepResult(step=work.step, rows=work.results, more=more)
        return Landing(rank, work.model, result, steps, time, work.seconds)

    def _count(self, work: _Work, steps: int) -> None:
        assert work.load is not None
        for device, seconds in work.load.devices.items():
            self.busy[device] += steps * seconds

    def _woken(self, now: float) -> list[tuple[int, int]]:
        woken = []
        for device, queue in list(self._reading.items()):
            while queue and queue[0][0] <= now:
                _, model = queue.popleft()
                self.has[device].add(model)
                woken.append((device, model))
                for work in self._all():
                    if work.model == model and device in work.missing:
                        work.missing.discard(device)
                        self._changed = True
            if not queue:
                del self._reading[device]
        return woken

    # --- pace

    def _find_pace(self, now: float) -> None:
        self._changed = False
        going = []
        for work in (work for works in self._at_work for work in works):
            if work.seconds < math.inf:
                work.left = max(0.0, work.left - (now - work.since) / work.seconds)
            work.since = now
            work.load = self._load(work)
            if work.missing:
                work.seconds = math.inf
            else:
                going.append(work)
        found = cycles(work.load for work in going if work.load is not None)
        for work in going:
            assert work.load is not None
            work.seconds = work.load.layers * found[work.rank]

    def _load(self, work: _Work) -> StepLoad:
        model, own = self._models[work.model], self._own[work.rank]
        costs = model.costs
        earlier = float(work.earlier)
        if work.goes_on and work.decodes:  # the mean of the steps of its lease
            earlier += (work.lease - 1) / 2 * len(work.results)
        attention = (
            model.attention.at(work.tokens)
            + costs.decode_read * earlier
            + costs.chunk_read * work.chunk_pairs
            + self._costs.host.step
        )
        if work.sampled:
            attention += model.head.at(work.sampled)
        ranks = self._ffn[work.model]
        ffn = model.ffn.at(work.tokens) / len(ranks)
        devices = {own: attention}
        for device in ranks:
            devices[device] = devices.get(device, 0.0) + ffn
        crossing = 0.0 if ranks == [own] else costs.layers * costs.crossing
        return StepLoad(work.rank, costs.layers, devices, attention + ffn + crossing)
