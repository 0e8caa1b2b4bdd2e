"""The seam between a device process and what drives the layers of its ranks.

:class:`Executor` is all that the device process knows. :class:`QueuedExecutor` holds the operations
that cannot begin yet, and :class:`LoopExecutor` carries steps to a loop that works by itself.
Scheduler, front end and models see none of them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from crosspool.kernels.engine_structs import (
    ADDED,
    CLOSED,
    DONE,
    LOGITS,
    REFUSED,
    REMOVED,
    TOKENS,
    Event,
)
from crosspool.ranks.flight import Flight
from crosspool.ranks.kv_rank import KVRank
from crosspool.transport.messages import Recall, Release, Step, StepResult

DRAIN_SECONDS = 1 / 3
"""Seconds without a dispatch after which an FFN rank counts as drained."""


class Executor(Protocol):
    """Carries out steps and releases for the attention rank of one device, and serves the
    dispatches of every attention rank to the FFN rank of that device."""

    def submit(self, operation: Step | Release) -> None:
        """Appends to the queue. Operations begin in this order, at once where they can: a step when
        a lane is free, a release when no step of its model is on a lane."""

    def recall(self, recall: Recall) -> None:
        """Ends a lease."""

    def run(self, timeout: float) -> list[StepResult]:
        """Does a bounded amount of ready work (about one part of one layer), or waits up to
        ``timeout`` seconds for some. Returns the results of steps that have ended, in order; each
        step of a lease has one."""

    @property
    def descriptor(self) -> int | None:
        """A file descriptor that becomes readable when ``run`` has something to do, for executors
        that work on their own; None: they work only while ``run`` is called."""

    @property
    def drained(self) -> bool:
        """Whether every submitted operation is done, and no attention rank of another device has
        dispatched for DRAIN_SECONDS."""

    @property
    def quiet(self) -> bool:
        """Whether nothing can become ready before the next ``submit``: the caller may then sleep
        on the control path instead of calling ``run``."""


class PeerDoorbell(Protocol):
    """The bell that other devices ring to wake this one."""

    def wait(self, timeout: float) -> bool:
        """Returns when a peer has rung since the last call, or after ``timeout`` seconds; says
        whether one has."""


class InFlight(Protocol):
    """A step between its beginning and its last result."""

    @property
    def model(self) -> int: ...

    leased: bool
    """Whether it has a lease that nobody has recalled."""


R = TypeVar("R", bound=KVRank[Any, Any])
F = TypeVar("F", bound=InFlight)


class QueuedExecutor(ABC, Generic[R, F]):
    """The queue of an :class:`Executor`: operations begin in order, up to the first that must wait.
    A step waits for room; a release waits for the steps of its model before it, and ends their
    leases."""

    descriptor: int | None = None

    def __init__(self, attention: R | None, *, polls_peers: bool) -> None:
        """``attention``: None on a device without an attention rank. ``polls_peers``: other
        devices' dispatches come, and only :meth:`run` finds them."""
        self._attention = attention
        self._polls_peers = polls_peers
        self._queue: deque[Step | Release] = deque()
        self._flights: dict[int, F] = {}
        """Steps in flight by their number."""

    def submit(self, operation: Step | Release) -> None:
        if self._attention is None:
            raise RuntimeError("a step or release came to a device without an attention rank")
        self._queue.append(operation)
        self._begin_queued()

    def recall(self, recall: Recall) -> None:
        if flight := self._flights.get(recall.step):
            self._end_lease(recall.step, flight)
            return
        for i, operation in enumerate(self._queue):
            if isinstance(operation, Step) and operation.step == recall.step:
                self._queue[i] = msgspec.structs.replace(operation, lease=1)

    @abstractmethod
    def run(self, timeout: float) -> list[StepResult]: ...

    def has(self, model: int) -> bool:
        """Whether an operation of the model is in flight or waits."""
        return any(operation.model == model for operation in self._queue) or any(
            flight.model == model for flight in self._flights.values()
        )

    @property
    def drained(self) -> bool:
        return self._idle and time.monotonic() - self._last_served() > DRAIN_SECONDS

    @property
    def quiet(self) -> bool:
        return self._idle and not self._polls_peers

    @abstractmethod
    def _begin(self, attention: R, step: Step) -> F | None:
        """Begins a step; None: it must wait until one in flight has ended."""

    @abstractmethod
    def _last_served(self) -> float:
        """CLOCK_MONOTONIC of the last dispatch of another device, in seconds; -inf or 0: none."""

    def _push_recall(self, step: int, flight: F) -> None:
        """Tells the loop, if there is one, to end the lease of a step in flight."""

    @property
    def _idle(self) -> bool:
        return not self._queue and not self._flights

    def _begin_queued(self) -> None:
        while self._queue:
            operation = self._queue[0]
            assert self._attention is not None
            if isinstance(operation, Release):
                before = [(n, f) for n, f in self._flights.items() if f.model == operation.model]
                for step, flight in before:
                    self._end_lease(step, flight)
                if before:
                    return
                self._attention.release(operation)
            else:
                begun = self._begin(self._attention, operation)
                if begun is None:
                    return
                self._flights[operation.step] = begun
            self._queue.popleft()

    def _end_lease(self, step: int, flight: F) -> None:
        if flight.leased:
            flight.leased = False
            self._push_recall(step, flight)


class StepLoop(Protocol):
    """A loop as :class:`LoopExecutor` knows it."""

    def push_resume(self, lane: int, step: int) -> None: ...

    def pop(self) -> Event | None: ...

    def close(self) -> None: ...


FL = TypeVar("FL", bound=Flight)


class LoopExecutor(QueuedExecutor[R, FL]):
    """An executor over a loop that takes steps as commands, works by itself, and tells of results
    and of logits that Python must look at by events."""

    def __init__(self, attention: R | None, loop: StepLoop, *, polls_peers: bool) -> None:
        super().__init__(attention, polls_peers=polls_peers)
        self._loop = loop
        self.on_change: dict[int, Callable[[int], None]] = {}
        """Called with a model, by the kind of the event: ``CLOSED``, ``ADDED``, ``REMOVED``."""

    @abstractmethod
    def _look(self, flight: FL, event: Event) -> None:
        """Samples from logits that the loop has left to Python; the step's lane waits."""

    def _result(self, flight: FL, event: Event) -> StepResult:
        """The result of a step that has ended; its lease may go on."""
        return flight.result(event.first, more=event.kind == TOKENS)

    def _take_events(self) -> list[StepResult]:
        """Handles every event that is there, and begins what waited for one.

        Raises what the loop's ``pop`` does when the loop cannot go on."""
        results = []
        while (event := self._loop.pop()) is not None:
            if event.kind in (CLOSED, ADDED, REMOVED):
                self.on_change[event.kind](event.lane)
                continue
            flight = self._flights[event.step]
            if event.kind == REFUSED:
                del self._flights[event.step]
                results.append(StepResult(step=event.step, rows=[], refused=True))
                continue
            if event.kind == LOGITS:
                self._look(flight, event)
                self._loop.push_resume(event.lane, event.step)
                continue
            if event.kind not in (DONE, TOKENS):
                raise RuntimeError(f"the loop told of an event of kind {event.kind}")
            if event.kind == DONE:
                del self._flights[event.step]
            results.append(self._result(flight, event))
        if results:
            self._begin_queued()
        return results

    def close(self) -> None:
        """Ends the loop; steps in flight are lost."""
        self._loop.close()
