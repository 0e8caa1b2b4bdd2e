"""The phases of one request that is traced, with their times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PhaseName = Literal["queue", "wake", "prefill", "decode", "replay"]


@dataclass(frozen=True)
class Phase:
    """Times are the scheduler's clock, in seconds."""

    name: PhaseName
    begin: float
    end: float


class RequestTimeline:
    """A request is in its ``queue``, in ``prefill`` from its admission to its first token, in
    ``decode`` until its last one, and in ``replay`` from the loss of its rank, or from its arrival
    at another scheduler, to the next token. These phases follow each other without a gap; the
    ``wake`` of its model lies beside them."""

    def __init__(self, traceparent: str, first: PhaseName, now: float) -> None:
        self.traceparent = traceparent
        """The span above the phases, as W3C's Trace Context writes it."""
        self.phases: list[Phase] = []
        """Those that have ended, in the order of their ends."""
        self._now_in: PhaseName = first
        self._since = now
        self._looked = now
        """Clock time until which wakes are in ``phases``."""

    @property
    def now_in(self) -> PhaseName:
        return self._now_in

    def enter(self, name: PhaseName, now: float) -> None:
        """Ends the phase, unless it is the one called ``name``, which begins."""
        if name != self._now_in:
            self.end(now)
            self._now_in, self._since = name, now

    def end(self, now: float) -> None:
        """Ends the phase, which is the last one unless :meth:`enter` follows."""
        self.phases.append(Phase(self._now_in, self._since, now))

    def saw_wake(self, wake: tuple[float, float] | None, now: float) -> None:
        """Notes beginning and end of the model's latest wake, as far as it lies between the last
        call and ``now``. None: the model has never been woken."""
        since, self._looked = self._looked, now
        if wake is None:
            return
        begin, end = max(wake[0], since), min(wake[1], now)
        if begin >= end:
            return
        for index, phase in enumerate(self.phases):
            if phase.name == "wake" and phase.end == begin:
                self.phases[index] = Phase("wake", phase.begin, end)
                return
        self.phases.append(Phase("wake", begin, end))
