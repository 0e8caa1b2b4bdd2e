"""The resident loop: native threads drive the lanes, Python carries steps in and results out.

A step is encoded once, when it begins. From there to its result no Python runs, except that it
looks once per step at the logits of rows with a grammar, penalties, a logit bias or
log-probabilities. sgl-kernel-ext/cpu/engine decides where parts are computed, and in which order.
"""

from __future__ import annotations

import contextlib
import os
import select

from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Loop, Team
from crosspool.ranks.executor import LoopExecutor
from crosspool.ranks.resident.flight import ResidentFlight, ResidentRank
from crosspool.transport.messages import Step, StepResult

_BUSY_SPIN_NS = 500_000
"""How long a device with cores of its own spins for another one's reply before it sleeps, in ns:
about the time of a layer."""


class ResidentLoop(LoopExecutor[ResidentRank, ResidentFlight]):
    """The :class:`~crosspool.ranks.executor.Executor` over native threads.

    A step may begin before a lane is free, so that the lane finds it at once."""

    _loop: Loop
    descriptor: int

    def __init__(
        self,
        attention: ResidentRank | None,
        team: Team,
        description: es.LoopDescription,
    ) -> None:
        """``description``: all fields but ``event_fd`` and ``busy_spin_ns``. The caller keeps the
        team and what the description points to.

        Raises EngineError when the description contradicts itself."""
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        description.event_fd = self.descriptor
        description.busy_spin_ns = _BUSY_SPIN_NS if description.spin_ns else 0
        self.loop = Loop(team, description)
        super().__init__(attention, self.loop, polls_peers=False)
        self._max_rows = description.max_rows
        self._most_flights = description.lanes + 1

    def run(self, timeout: float) -> list[StepResult]:
        """Returns results that are there, or the first that comes within ``timeout`` seconds.

        Raises EngineError when the loop cannot go on."""
        results = self._take_events()
        if not results and timeout > 0:
            select.select([self.descriptor], [], [], timeout)
            results = self._take_events()
        return results

    def close(self) -> None:
        super().close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _take_events(self) -> list[StepResult]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        return super()._take_events()

    def _begin(self, attention: ResidentRank, step: Step) -> ResidentFlight | None:
        if len(self._flights) == self._most_flights:
            return None
        flight = attention.begin(step, self._max_rows)
        self._loop.push_step(flight.arguments)
        return flight

    def _push_recall(self, step: int, flight: ResidentFlight) -> None:
        self._loop.push_recall(step)

    def _look(self, flight: ResidentFlight, event: es.Event) -> None:
        assert self._attention is not None and event.address is not None
        vocab = self._attention.specs[flight.model].vocab
        flight.take_logits(event.first, event.count, event.address, vocab)

    def _last_served(self) -> float:
        return self._loop.last_served_ns / 1e9
