"""The resident loop: native threads drive the lanes, Python carries steps in and results out.

A step is encoded once, when it begins; from there to its result no Python runs, except that rows
with a grammar, penalties, a logit bias or log-probabilities have their logits looked at here, once
per step. Where the parts are computed, and in which order, is in sgl-kernel-ext/cpu/engine.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from dataclasses import dataclass

import msgspec

from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Loop, Team
from crosspool.ranks.resident.flight import Flight, ResidentRank
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.messages import Recall, Release, Step, StepResult

_DRAIN_NS = 333_000_000
_BUSY_SPIN_NS = 500_000
"""How long a device with cores of its own spins for the answer of another one, about a layer's
time, before it sleeps."""


@dataclass
class ResidentLink:
    """What is known of a link that native code drives: for the counters."""

    attention_rank: int
    lane: int
    ffn_rank: int
    _native: es.NativeLinkCounters

    @property
    def counters(self) -> LinkCounters:
        native = self._native
        return LinkCounters(
            native.dispatches, native.rows, native.dispatch_bytes, native.combine_bytes
        )


class ResidentLoop:
    """The :class:`~crosspool.ranks.executor.Executor` over native threads."""

    def __init__(
        self,
        attention: ResidentRank | None,
        team: Team,
        description: es.LoopDescription,
    ) -> None:
        """``description``: everything but ``event_fd`` and ``busy_spin_ns``; the caller keeps what
        it points to, the team too. Raises EngineError when it contradicts itself."""
        self._attention = attention
        self._max_rows = description.max_rows
        self._most_flights = description.lanes + 1
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        description.event_fd = self.descriptor
        description.busy_spin_ns = _BUSY_SPIN_NS if description.spin_ns else 0
        self._loop = Loop(team, description)
        self.loop = self._loop
        self._queue: deque[Step | Release] = deque()
        self._flights: dict[int, Flight] = {}

    def submit(self, operation: Step | Release) -> None:
        if self._attention is None:
            raise RuntimeError("a step or release came to a device without an attention rank")
        self._queue.append(operation)
        self._begin_queued()

    def recall(self, recall: Recall) -> None:
        if recall.step in self._flights:
            self._recall(recall.step)
            return
        for i, operation in enumerate(self._queue):
            if isinstance(operation, Step) and operation.step == recall.step:
                self._queue[i] = msgspec.structs.replace(operation, lease=1)

    def run(self, timeout: float) -> list[StepResult]:
        """Results that are there, or the first that comes within ``timeout`` seconds.

        Raises EngineError when the loop cannot go on."""
        results = self._take_events()
        if not results and timeout > 0:
            select.select([self.descriptor], [], [], timeout)
            results = self._take_events()
        if results:
            self._begin_queued()
        return results

    @property
    def drained(self) -> bool:
        idle_ns = time.monotonic_ns() - self._loop.last_served_ns
        return self.quiet and idle_ns > _DRAIN_NS

    @property
    def quiet(self) -> bool:
        return not self._queue and not self._flights

    def close(self) -> None:
        """Ends the loop; steps in flight are lost."""
        self._loop.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _begin_queued(self) -> None:
        """Begins operations in order, up to the first that must wait. A step may begin before a
        lane is free, so that the lane finds it at once; a release waits for the steps of its model
        that came before it, and ends their leases."""
        attention = self._attention
        assert attention is not None
        while self._queue:
            operation = self._queue[0]
            if isinstance(operation, Release):
                before = [n for n, f in self._flights.items() if f.model == operation.model]
                for step in before:
                    self._recall(step)
                if before:
                    return
                attention.release(operation)
            else:
                if len(self._flights) == self._most_flights:
                    return
                flight = attention.begin(operation, self._max_rows)
                self._flights[operation.step] = flight
                self._loop.push_step(flight.arguments)
            self._queue.popleft()

    def _recall(self, step: int) -> None:
        flight = self._flights[step]
        if flight.leased:
            flight.leased = False
            self._loop.push_recall(step)

    def _take_events(self) -> list[StepResult]:
        results = []
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        while (event := self._loop.pop()) is not None:
            flight = self._flights[event.step]
            if event.kind in (es.DONE, es.TOKENS):
                more = event.kind == es.TOKENS
                if not more:
                    del self._flights[event.step]
                results.append(flight.result(event.first, more=more))
            else:
                assert self._attention is not None and event.address is not None
                vocab = self._attention.specs[flight.model].vocab
                flight.take_logits(event.first, event.count, event.address, vocab)
                self._loop.push_resume(event.lane, event.step)
        return results
