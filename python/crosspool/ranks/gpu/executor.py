"""The :class:`~crosspool.ranks.executor.Executor` of a GPU, over either of its loops."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from crosspool.kernels.engine_structs import DONE, LOGITS, TOKENS, Event
from crosspool.ranks.gpu.ffn_executor import ServedPeers
from crosspool.ranks.gpu.flight import GPUFlight, GPURank
from crosspool.ranks.gpu.inputs import HostMemory, InputLayout
from crosspool.ranks.gpu.loop import DeviceLoop
from crosspool.ranks.weights import TORCH_DTYPES
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.messages import Recall, Release, Step, StepResult

if TYPE_CHECKING:
    from crosspool.ranks.gpu.stages import Stages

_LONGEST_WAIT = 100e-6
"""Seconds that :meth:`GPUExecutor.run` waits at most: so long may a new step for a free lane stay
unnoticed."""


class GPUExecutor:
    """Carries out the steps of the attention rank of one GPU, and drives its FFN rank, if it has
    one, in the same loop.

    A step begins when a lane is free."""

    def __init__(
        self,
        attention: GPURank,
        loop: DeviceLoop,
        *,
        buckets: Sequence[int],
        stages: Mapping[tuple[int, int, int], Stages],
        memory: Sequence[HostMemory],
        counters: Sequence[Sequence[Sequence[LinkCounters]]],
        pinned: bool,
        serves_peers: bool = False,
    ) -> None:
        """``buckets``: rows, ascending; ``stages``: by lane, model and bucket; ``memory``: by lane;
        ``counters``: of the links to a model's FFN ranks, by lane and model; ``pinned``: host
        memory that the device reads must be; ``serves_peers``: dispatches come from other devices.
        """
        self._attention = attention
        self._loop = loop
        self._closed = False
        self._buckets = buckets
        self._stages = stages
        self._layouts: list[list[InputLayout]] = [
            [stages[0, model, bucket].layout for bucket in range(len(buckets))]
            for model in range(len(attention.specs))
        ]
        self._memory = memory
        self._counters = counters
        self._peers = ServedPeers(loop) if serves_peers else None
        self._queue: deque[Step | Release] = deque()
        self._flights: dict[int, GPUFlight] = {}
        """By lane."""
        wanted = max(layout.wanted for of_model in self._layouts for layout in of_model)
        vocab = max(spec.vocab for spec in attention.specs)
        self._logits = torch.empty(wanted * vocab, pin_memory=pinned)
        self._stream = torch.cuda.Stream() if pinned else None

    def submit(self, operation: Step | Release) -> None:
        self._queue.append(operation)
        self._begin_queued()

    def recall(self, recall: Recall) -> None:
        for lane, flight in self._flights.items():
            if flight.arguments.step == recall.step:
                self._recall(lane, flight)
                return
        for i, operation in enumerate(self._queue):
            if isinstance(operation, Step) and operation.step == recall.step:
                self._queue[i] = msgspec.structs.replace(operation, lease=1)

    def run(self, timeout: float) -> list[StepResult]:
        """Raises CudaLoopError or LaneError when the loop cannot go on."""
        if self._flights:
            self._loop.wait(min(timeout, _LONGEST_WAIT))
        elif self._peers is not None:
            self._loop.wait(timeout)
        results = []
        while (event := self._loop.pop()) is not None:
            result = self._take(event)
            if result is not None:
                results.append(result)
        if results:
            self._begin_queued()
        return results

    @property
    def descriptor(self) -> None:
        return None

    @property
    def drained(self) -> bool:
        return self._idle and (self._peers is None or self._peers.drained)

    @property
    def quiet(self) -> bool:
        return self._idle and self._peers is None

    @property
    def _idle(self) -> bool:
        return not self._queue and not self._flights

    def quiesced(self) -> contextlib.AbstractContextManager[None]:
        """Within, no loop is on the device: for driver calls that may wait for what runs there."""
        return contextlib.nullcontext() if self._closed else self._loop.quiesced()

    def close(self) -> None:
        """Ends the loop; steps in flight are lost."""
        self._loop.close()
        self._closed = True

    def _take(self, event: Event) -> StepResult | None:
        flight = self._flights[event.lane]
        if event.kind == LOGITS:
            arguments, spec = flight.arguments, self._attention.specs[flight.model]
            stages = self._stages[event.lane, flight.model, arguments.bucket]
            size = stages.layout.wanted * spec.vocab
            with self._beside():
                flight.look(stages, self._logits[:size].view(-1, spec.vocab))
            self._loop.push_resume(event.lane, event.step)
            return None
        if event.kind not in (DONE, TOKENS):
            raise RuntimeError(f"the loop of a GPU answered with an event of kind {event.kind}")
        self._count(event.lane, flight)
        more = event.kind == TOKENS
        if not more:
            del self._flights[event.lane]
        return flight.result(event.first, more=more)

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        """What Python computes within runs on a stream of its own: torch's default stream waits
        for all others, and so for a loop that never ends."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _count(self, lane: int, flight: GPUFlight) -> None:
        """What crossed the links in the step that ended, or would have within the device."""
        spec = self._attention.specs[flight.model]
        rows = spec.layers * flight.rows
        size = rows * spec.hidden * TORCH_DTYPES[spec.dtype].itemsize
        for counters in self._counters[lane][flight.model]:
            counters.dispatches += spec.layers
            counters.rows += rows
            counters.dispatch_bytes += size
            counters.combine_bytes += size

    def _begin_queued(self) -> None:
        """Begins operations in order, up to the first that must wait; a release waits for the
        steps of its model that came before it, and ends their leases."""
        while self._queue:
            operation = self._queue[0]
            if isinstance(operation, Release):
                before = {
                    lane: flight
                    for lane, flight in self._flights.items()
                    if flight.model == operation.model
                }
                for lane, flight in before.items():
                    self._recall(lane, flight)
                if before:
                    return
                self._attention.release(operation)
            else:
                lane = next((n for n in range(len(self._memory)) if n not in self._flights), -1)
                if lane < 0:
                    return
                flight = self._attention.begin(
                    operation, self._buckets, self._layouts, self._memory[lane]
                )
                self._flights[lane] = flight
                self._loop.push_step(lane, flight.arguments)
            self._queue.popleft()

    def _recall(self, lane: int, flight: GPUFlight) -> None:
        if flight.leased:
            flight.leased = False
            self._loop.push_recall(lane, flight.arguments.step)
