"""The seam between a device process and what drives its layers.

The host loop (:mod:`crosspool.ranks.host.executor`) implements it in Python; a resident loop takes
its place by implementing it over its own threads or device-launched graphs. Scheduler, front end
and models see neither.
"""

from __future__ import annotations

from typing import Protocol

from crosspool.transport.messages import Recall, Release, Step, StepResult


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
        ``timeout`` seconds for some. Returns the steps that ended, in the order they ended, those
        of a lease among them."""

    @property
    def descriptor(self) -> int | None:
        """A file descriptor that becomes readable when ``run`` has something to do, for executors
        that work on their own; None: they work only while ``run`` is called."""

    @property
    def drained(self) -> bool:
        """Whether every submitted operation is done, and no attention rank of another device has
        dispatched for a third of a second."""

    @property
    def quiet(self) -> bool:
        """Whether nothing can become ready before the next ``submit``: the caller may then sleep
        on the control path instead of calling ``run``."""
