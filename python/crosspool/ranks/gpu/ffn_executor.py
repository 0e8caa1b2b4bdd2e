"""What drives the FFN rank of a GPU that has no attention rank, and how it is known that other
devices no longer need one."""

from __future__ import annotations

import contextlib
import time

from crosspool.ranks.gpu.loop import DeviceLoop
from crosspool.transport.messages import Recall, Release, Step, StepResult

_DRAIN_SECONDS = 1 / 3


class ServedPeers:
    """When the loop's FFN rank last had a dispatch of another device, as seen by who asks."""

    def __init__(self, loop: DeviceLoop) -> None:
        self._loop = loop
        self._served = -1
        self._since = 0.0

    @property
    def drained(self) -> bool:
        """Whether none came for a while."""
        served = self._loop.served
        if served != self._served:
            self._served, self._since = served, time.monotonic()
        return time.monotonic() - self._since > _DRAIN_SECONDS


class GPUFFNExecutor:
    """The :class:`~crosspool.ranks.executor.Executor` of a GPU that has an FFN rank alone."""

    descriptor = None
    quiet = False

    def __init__(self, loop: DeviceLoop) -> None:
        self._loop = loop
        self._peers = ServedPeers(loop)

    def submit(self, operation: Step | Release) -> None:
        raise RuntimeError("a step or release came to a device without an attention rank")

    def recall(self, recall: Recall) -> None:
        pass

    def run(self, timeout: float) -> list[StepResult]:
        """Raises CudaLoopError or LaneError when the loop cannot go on."""
        self._loop.wait(timeout)
        if (event := self._loop.pop()) is not None:
            raise RuntimeError(f"the loop of an FFN rank told an event of kind {event.kind}")
        return []

    @property
    def drained(self) -> bool:
        return self._peers.drained

    def quiesced(self) -> contextlib.AbstractContextManager[None]:
        """As :meth:`GPUExecutor.quiesced`."""
        return self._loop.quiesced()

    def close(self) -> None:
        self._loop.close()
