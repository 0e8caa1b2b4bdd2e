"""What requests of models that sleep wait for: the scheduler's residency over arrivals in time.

A request whose model is resident is served at once, for as long as it is said to take; others wait
until their model has been woken, one model after another on each device. One whose model gives way
stands still and goes on later. Room for KV cache, and what requests take of each other's time, are
left out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.budgets import Budgets
from crosspool.scheduler.residency import ResidencyPolicy
from crosspool.scheduler.worth import HALF_LIFE_PER_MODEL, RecentRate
from crosspool.transport.messages import Wake


@dataclass(frozen=True)
class Visit:
    """A request as it comes."""

    arrival: float
    """Seconds from the start."""
    model: int
    service: float
    """Seconds for which its model must be resident until it is answered."""


@dataclass
class Visited:
    """What came of a request."""

    is_hit: bool
    """Whether its model was resident when it came."""
    wait: float = math.nan
    """Seconds from its arrival until its model could first make steps for it."""


@dataclass(frozen=True)
class Visits:
    """What came of all requests, in their order."""

    outcomes: list[Visited]
    wakes: list[tuple[float, int]]
    """When which model had been woken."""


@dataclass
class _Open:
    """A request that is not over."""

    visit: Visit
    outcome: Visited
    left: float
    """Seconds of service that it lacks, when it was last looked at."""
    since: float = math.nan
    """Time at which it was; NaN while it stands still."""


@dataclass
class _Model:
    requests: list[_Open] = field(default_factory=list)
    awake: bool = False
    served: int = 0
    """Counts changes of what is served; an end that was foreseen before is not one."""


def serve(
    visits: Sequence[Visit],
    budgets: Budgets,
    models: Mapping[int, ModelConfig],
    *,
    bytes_per_s: float,
    quantum: float,
) -> Visits:
    """Has the visits, which come in order, served by the scheduler's rule.

    ``budgets`` have a place for attention weights, without which no model makes steps.
    ``bytes_per_s``: at which a device reads weights. ``quantum``: seconds for which a woken model
    with requests keeps its room. At the start, those models are resident that fit together, in the
    order of their numbers."""
    return _Server(visits, budgets, models, bytes_per_s, quantum).run()


class _Server:
    def __init__(
        self,
        visits: Sequence[Visit],
        budgets: Budgets,
        models: Mapping[int, ModelConfig],
        bytes_per_s: float,
        quantum: float,
    ) -> None:
        self._visits = visits
        self._budgets = budgets
        self._bytes_per_s = bytes_per_s
        self._models = {number: _Model() for number in models}
        resident: set[int] = set()
        for number, options in models.items():
            if options.keep != "asleep" and not budgets.crowded(resident | {number}):
                resident.add(number)
        worth = RecentRate(HALF_LIFE_PER_MODEL * len(models))
        self._policy = ResidencyPolicy(
            budgets, models, resident, quantum=quantum, worth=worth, now=0.0
        )
        self._events: list[tuple[float, int, int, int]] = []
        """Ends of wakes (time, model, device, 0) and of services (time, model, -1, served)."""
        self._free_at = {spot.device: 0.0 for spot in budgets.places}
        """When each device has read what it was told to read."""
        self._found: list[Visited] = []
        self._wakes: list[tuple[float, int]] = []

    def run(self) -> Visits:
        self._decide(0.0)
        for visit in self._visits:
            self._go_on(visit.arrival)
            policy, model = self._policy, self._models[visit.model]
            policy.used(visit.model, visit.arrival)
            outcome = Visited(is_hit=model.awake)
            self._found.append(outcome)
            model.requests.append(_Open(visit, outcome, visit.service))
            self._decide(visit.arrival)
            if model.awake:
                self._serve(visit.model, visit.arrival)
        self._go_on(math.inf)
        return Visits(self._found, self._wakes)

    def _go_on(self, until: float) -> None:
        """Everything that happens before ``until``."""
        while True:
            event = self._events[0][0] if self._events else math.inf
            due = self._policy.next_deadline()
            now = min(event, due)
            if now >= until:
                return
            if event <= due:
                _, model, device, served = heapq.heappop(self._events)
                if device >= 0:
                    self._policy.woken(device, model, now)
                elif served != self._models[model].served:
                    continue
                else:
                    self._serve(model, now)
            self._decide(now)

    def _decide(self, now: float) -> None:
        policy = self._policy
        work = {number for number, model in self._models.items() if model.requests}
        policy.decide(work, now)
        while orders := list(policy.orders(frozenset())):
            for device, order in orders:
                if isinstance(order, Wake):
                    spots = [spot for spot in self._budgets.places if spot.device == device]
                    nbytes = sum(spot.held.get(order.model, 0) for spot in spots)
                    begin = max(now, self._free_at[device])
                    self._free_at[device] = end = begin + nbytes / self._bytes_per_s
                    heapq.heappush(self._events, (end, order.model, device, 0))
                else:
                    policy.slept(device, order.model)
        self._look(now)

    def _look(self, now: float) -> None:
        """Has requests of models that have been woken go on, and those of others stand still."""
        for number, model in self._models.items():
            awake = self._policy.state(number) == "resident"
            if awake != model.awake:
                self._serve(number, now)
                model.awake = awake
                if awake:
                    self._wakes += [(now, number)] if now else []
                self._serve(number, now)

    def _serve(self, number: int, now: float) -> None:
        """Brings the requests of a model up to now, and foresees the end of the next one."""
        model = self._models[number]
        for request in model.requests:
            if not math.isnan(request.since):
                request.left -= now - request.since
            request.since = now if model.awake else math.nan
            if model.awake and math.isnan(request.outcome.wait):
                request.outcome.wait = now - request.visit.arrival
        model.requests = [request for request in model.requests if request.left > 1e-9]
        model.served += 1
        if model.awake and model.requests:
            end = now + min(request.left for request in model.requests)
            heapq.heappush(self._events, (end, number, -1, model.served))
