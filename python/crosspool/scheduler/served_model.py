"""One model as the scheduler's core serves it."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.counters import ModelCounters
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rates import ModelRates
from crosspool.scheduler.request_times import RequestTimes


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What there is to know about the model, its requests that wait, and what is counted of it."""

    name: str
    tools: ModelTools
    layout: KVLayout
    queue: WaitingQueue
    counters: ModelCounters = field(default_factory=ModelCounters)
    rates: ModelRates = field(default_factory=ModelRates)
    times: RequestTimes = field(default_factory=RequestTimes)

    @property
    def spec(self) -> ModelSpec:
        return self.tools.spec
