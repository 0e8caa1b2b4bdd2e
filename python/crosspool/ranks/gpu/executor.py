"""The :class:`~crosspool.ranks.executor.Executor` of a GPU, over either of its loops."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from crosspool.kernels.engine_structs import Event
from crosspool.ranks.executor import LoopExecutor
from crosspool.ranks.gpu.flight import GPUFlight, GPURank, LookMemory
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.inputs import HostMemory, InputLayout
from crosspool.ranks.gpu.loop import DeviceLoop
from crosspool.ranks.weights import TORCH_DTYPES
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.heartbeats import Activity, Heartbeat
from crosspool.transport.messages import Step, StepResult

if TYPE_CHECKING:
    from crosspool.ranks.gpu.stages import Stages

_LONGEST_WAIT = 100e-6
"""Longest wait of :meth:`GPUExecutor.run` while steps are in flight, in seconds. A new step for a
free lane may stay unnoticed for as long."""
_SHOW_SECONDS = 0.05
"""Seconds between two looks at what the loop does, for its heartbeat."""


class GPUExecutor(LoopExecutor[GPURank, GPUFlight]):
    """Carries out the steps of the attention rank of one GPU, and drives its FFN rank, in one loop;
    either rank may be missing. A step begins when a lane is free."""

    _loop: DeviceLoop

    def __init__(
        self,
        attention: GPURank | None,
        loop: DeviceLoop,
        *,
        buckets: Sequence[int] = (),
        stages: Mapping[tuple[int, int, int], Stages] | None = None,
        memory: Sequence[HostMemory] = (),
        counters: Sequence[Sequence[Sequence[LinkCounters]]] = (),
        host: HostSide | None = None,
        polls_peers: bool = False,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """A device without an attention rank needs ``polls_peers`` alone.

        ``buckets``: rows, ascending; ``stages``: by lane, model and bucket; ``memory``: what each
        lane shares with the host; ``counters``: counters of the links to a model's FFN ranks,
        indexed [lane][model]; ``host``: the host's side of the device (None: CPU tensors);
        ``heartbeat``: where :meth:`run` shows what the loop does."""
        super().__init__(attention, loop, polls_peers=polls_peers)
        self._closed = False
        self._heartbeat = heartbeat
        self._next_show = 0.0
        self._looks = 0
        self._buckets = buckets
        self._stages = stages or {}
        specs = [] if attention is None else list(attention.specs.values())
        self._layouts: list[list[InputLayout]] = [
            [self._stages[0, model, bucket].layout for bucket in range(len(buckets))]
            for model in range(len(specs))
        ]
        self._memory = memory
        self._counters = counters
        self._served, self._served_at = -1, -math.inf
        wanted = [layout.wanted for of_model in self._layouts for layout in of_model]
        self._host = host or HostSide(torch.device("cpu"))
        self._look_memory = LookMemory(specs, max(wanted, default=0), self._host)

    def run(self, timeout: float) -> list[StepResult]:
        """Raises CudaLoopError or LaneError when the loop cannot go on."""
        if self._flights:
            self._loop.wait(min(timeout, _LONGEST_WAIT))
        elif self._polls_peers:
            self._loop.wait(timeout)
        results = self._take_events()
        if self._heartbeat is not None:
            self._show(self._heartbeat)
        return results

    def _show(self, heartbeat: Heartbeat) -> None:
        """Shows what the loop does, now and then, and in any case that it has nothing to do: the
        next call may be long in coming. While a lane computes, it does not count that others look
        for work: its stage may never end."""
        now = time.monotonic()
        if now < self._next_show and not self.quiet:
            return
        self._next_show = now + _SHOW_SECONDS
        stepping = {flight.lane for flight in self._flights.values()}
        activity, looks, advances = self._loop.activity(stepping)
        if activity != Activity.COMPUTING:
            self._looks = looks
        heartbeat.show(activity, self._looks, advances)

    def quiesced(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the loop off the device, for driver calls that may wait for what runs there."""
        return contextlib.nullcontext() if self._closed else self._loop.quiesced()

    def close(self) -> None:
        super().close()
        self._closed = True

    def _begin(self, attention: GPURank, step: Step) -> GPUFlight | None:
        busy = {flight.lane for flight in self._flights.values()}
        lane = next((n for n in range(len(self._memory)) if n not in busy), None)
        if lane is None:
            return None
        flight = attention.begin(step, self._buckets, self._layouts, lane, self._memory[lane])
        self._loop.push_step(lane, flight.arguments)
        return flight

    def _push_recall(self, step: int, flight: GPUFlight) -> None:
        self._loop.push_recall(flight.lane, step)

    def _look(self, flight: GPUFlight, event: Event) -> None:
        assert self._attention is not None
        stages = self._stages[flight.lane, flight.model, flight.arguments.bucket]
        with self._host.beside():
            flight.look(stages, self._look_memory)

    def _result(self, flight: GPUFlight, event: Event) -> StepResult:
        self._count(flight)
        return super()._result(flight, event)

    def _last_served(self) -> float:
        """The loop counts the dispatches that it has served; this is when the count was last seen
        to grow."""
        if self._polls_peers and (served := self._loop.served) != self._served:
            self._served, self._served_at = served, time.monotonic()
        return self._served_at

    def _count(self, flight: GPUFlight) -> None:
        """Counts what crossed the links in the step that ended, or would have within the device."""
        assert self._attention is not None
        spec = self._attention.specs[flight.model]
        rows = spec.layers * flight.rows
        size = rows * spec.hidden * TORCH_DTYPES[spec.dtype].itemsize
        for counters in self._counters[flight.lane][flight.model]:
            counters.dispatches += spec.layers
            counters.rows += rows
            counters.dispatch_bytes += size
            counters.combine_bytes += size
