"""Loops over the stages of a GPU's lanes: the interface of both loops, and the loop in Python.

:class:`crosspool.kernels.cuda_loop.CudaLoop` is resident: the device launches the stages itself.
:class:`HostLaunchedLoop` launches the same stages from Python, one by one; it is the reference, and
the baseline of the ablation. Both take the same steps and tell the same events.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from crosspool.kernels.cuda_loop import GPUStage, ModelStages
from crosspool.kernels.cuda_loop_structs import GPUStepArguments
from crosspool.kernels.engine_structs import DONE, LOGITS, TOKENS, Event
from crosspool.ranks.gpu.exchange import DispatchEnd, HostExchange, ReplyEnd
from crosspool.transport.data_path import DispatchHeader, LaneError
from crosspool.transport.heartbeats import Activity

if TYPE_CHECKING:
    from crosspool.ranks.gpu.launch import Launcher
    from crosspool.ranks.gpu.trace import GPUTrace

_SLEEP = 20e-6
"""Seconds between two polls while every lane waits for the device."""


class DeviceLoop(Protocol):
    """The methods that both loops have; :class:`crosspool.kernels.cuda_loop.CudaLoop` describes
    them."""

    def push_step(self, lane: int, arguments: GPUStepArguments) -> None: ...

    def push_resume(self, lane: int, step: int) -> None: ...

    def push_recall(self, lane: int, step: int) -> None: ...

    def pop(self) -> Event | None: ...

    def wait(self, timeout_s: float) -> bool: ...

    def quiesced(self) -> contextlib.AbstractContextManager[None]: ...

    def close(self) -> None: ...

    def activity(self, stepping: Collection[int]) -> tuple[Activity, int, int]: ...

    @property
    def served(self) -> int: ...


@dataclass
class _Lane:
    work: Iterator[Callable[[], bool]] | None = None
    """Work under way. It yields conditions, each of which must hold before it goes on."""
    until: Callable[[], bool] | None = None
    queue: deque[GPUStepArguments] = field(default_factory=deque)
    step: GPUStepArguments | None = None
    with_host: bool = False
    on_device: bool = False
    """Whether the lane waits for the device."""
    recalled: bool = False


class HostLaunchedLoop:
    """Launches the stages of each lane from Python, a part at a time, lanes in rotation, within
    :meth:`wait`. It polls lanes whose last part, or whose payloads, the device still works on."""

    def __init__(
        self,
        models: Sequence[ModelStages],
        lanes: int,
        launcher: Launcher,
        watch: GPUTrace | None = None,
        exchange: HostExchange | None = None,
    ) -> None:
        """``lanes``: number of lanes of the attention rank."""
        self._models = models
        self._steps = [_Lane() for _ in range(lanes)]
        self._launcher = launcher
        self._watch = watch
        self._exchange = exchange
        self._events: deque[Event] = deque()
        self._next = 0
        self._advances = 0
        self._looks = 0
        self.served = 0
        """Dispatches of other devices to which the FFN rank has replied."""
        self._lanes = list(self._steps)
        for ends in () if exchange is None else exchange.served:
            serving = _Lane()
            serving.work = self._serve(len(self._lanes), serving, ends)
            self._lanes.append(serving)

    def push_step(self, lane: int, arguments: GPUStepArguments) -> None:
        self._steps[lane].queue.append(arguments)

    def push_resume(self, lane: int, step: int) -> None:
        state = self._steps[lane]
        if not state.with_host or state.step is None or state.step.step != step:
            raise RuntimeError(f"lane {lane}: step {step} does not wait for the host")
        state.with_host = False

    def push_recall(self, lane: int, step: int) -> None:
        state = self._steps[lane]
        if state.step is not None and state.step.step == step:
            state.recalled = True
        for waiting in state.queue:
            if waiting.step == step:
                waiting.lease = 1

    def pop(self) -> Event | None:
        return self._events.popleft() if self._events else None

    def wait(self, timeout_s: float) -> bool:
        """Launches the next part of a lane that has one, or polls until one can go on. Returns
        whether there is an event.

        Raises LaneError when a peer breaks the lane protocol."""
        deadline = time.monotonic() + timeout_s
        while not self._events and not self._advance_one():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if self._exchange is None or any(lane.on_device for lane in self._lanes):
                time.sleep(_SLEEP)
            else:
                self._exchange.doorbell.wait(left)
        return bool(self._events)

    @contextlib.contextmanager
    def quiesced(self) -> Iterator[None]:
        """Does nothing: what was launched ends by itself, and nothing of this loop stays on the
        device."""
        yield

    def close(self) -> None:
        """Waits until everything that was launched has ended."""
        for lane in range(len(self._lanes)):
            self._launcher.synchronize(lane)

    def activity(self, stepping: Collection[int]) -> tuple[Activity, int, int]:
        """Returns what the lanes of the FFN rank and those in ``stepping`` do, how often this was
        asked, and how many parts have been launched."""
        found = Activity.IDLE
        self._looks += 1
        for lane, state in enumerate(self._lanes):
            is_step = lane in stepping
            ready = is_step and (state.work is None or state.until is _at_once)
            if state.on_device or ready:
                return Activity.COMPUTING, self._looks, self._advances
            if is_step and not state.with_host:
                found = Activity.WAITING
        return found, self._looks, self._advances

    def _advance_one(self) -> bool:
        for _ in self._lanes:
            lane = self._next
            self._next = (lane + 1) % len(self._lanes)
            if self._advance(lane, self._lanes[lane]):
                return True
        return False

    def _advance(self, lane: int, state: _Lane) -> bool:
        """Does what is next on a lane. Returns False where nothing can be done."""
        if state.work is None:
            if not state.queue:
                return False
            state.step, state.recalled = state.queue.popleft(), False
            state.work = self._step(lane, state, state.step)
        elif state.until is not None and not state.until():
            return False
        self._advances += 1
        state.on_device = False
        state.until = next(state.work, None)
        if state.until is None:
            state.work = state.step = None
        return True

    def _step(
        self, lane: int, state: _Lane, step: GPUStepArguments
    ) -> Iterator[Callable[[], bool]]:
        """Carries out a step, with all of its lease."""
        launcher, model = self._launcher, self._models[step.model]
        stage, done, more = GPUStage.EMBED, 0, True
        while more:
            launcher.write(lane, step.inputs, step.rows, done)
            launcher.launch(lane, step.model, stage, step.bucket)
            for layer in range(len(model.kinds)):
                yield from self._layer(lane, state, step, layer)
            if step.wanted:
                yield _at_once
                start = time.monotonic_ns()
                launcher.set_layer(lane, len(model.kinds))
                launcher.launch(lane, step.model, GPUStage.HEAD, step.bucket)
                launcher.fetch(lane, step.tokens + 4 * done * step.wanted, step.wanted)
                self._tell(lane, step, GPUStage.HEAD, -1, start)
            yield self._device_is_done(lane, state)
            if step.for_host:
                state.with_host = True
                self._events.append(Event(LOGITS, lane, step.step, 0, step.wanted, None))
                yield lambda: not state.with_host
            more = done + 1 < step.lease and not state.recalled and not state.queue
            more = more and not _stopped(step, done)
            kind = TOKENS if more else DONE
            self._events.append(Event(kind, lane, step.step, done, step.wanted, None))
            stage, done = GPUStage.FEED, done + 1

    def _layer(
        self, lane: int, state: _Lane, step: GPUStepArguments, layer: int
    ) -> Iterator[Callable[[], bool]]:
        """Carries out a layer; its last stage is launched with the next part."""
        launcher, model = self._launcher, self._models[step.model]
        if layer > 0 and not model.links:
            yield _at_once
        start = time.monotonic_ns()
        launcher.set_layer(lane, layer)
        launcher.launch(lane, step.model, GPUStage.ATTENTION, step.bucket)
        self._tell(lane, step, GPUStage.ATTENTION, layer, start)
        ends: list[DispatchEnd] = []
        if model.links:
            assert self._exchange is not None
            ends = [self._exchange.outgoing[lane][link] for link in model.links]
            # A predecessor's dispatch may still wait for its reply.
            yield lambda: all(end.free for end in ends)
            launcher.launch(lane, step.model, GPUStage.DISPATCH, step.bucket)
            yield self._device_is_done(lane, state)
            header = DispatchHeader(epoch=0, model=step.model, layer=layer, rows=step.rows)
            for end in ends:
                end.announce(header, model.row_bytes)
        else:
            yield _at_once
        if model.local:
            start = time.monotonic_ns()
            stage = _ffn_stage(model, layer)
            launcher.launch(lane, step.model, stage, step.bucket)
            self._tell(lane, step, stage, layer, start)
        if model.links:
            yield lambda: all(end.ready() for end in ends)
            for end in ends:
                end.accept()
            launcher.launch(lane, step.model, GPUStage.COMBINE, step.bucket)

    def _serve(
        self, lane: int, state: _Lane, ends: Sequence[ReplyEnd]
    ) -> Iterator[Callable[[], bool]]:
        """Serves other devices' dispatches for ever, links in rotation."""
        exchange, launcher = self._exchange, self._launcher
        assert exchange is not None
        first = 0
        while True:
            yield lambda: any(end.poll() is not None for end in ends)
            turn = [(first + i) % len(ends) for i in range(len(ends))]
            link = next(i for i in turn if ends[i].poll() is not None)
            end, header = ends[link], ends[link].poll()
            assert header is not None
            bucket = self._check(exchange, end, header)
            start = time.monotonic_ns()
            launcher.write(lane, 0, header.rows, 0, layer=header.layer, link=link)
            stage = _ffn_stage(self._models[header.model], header.layer)
            launcher.launch(lane, header.model, stage, bucket)
            yield self._device_is_done(lane, state)
            if self._watch is not None and self._watch.on:
                self._watch.served(end.attention_rank, end.lane, header, start)
            end.announce_reply()
            self.served += 1
            first = link + 1

    def _check(self, exchange: HostExchange, end: ReplyEnd, header: DispatchHeader) -> int:
        """Returns the bucket of a dispatch. Raises LaneError for one that cannot be carried out."""
        model = self._models[header.model] if header.model in exchange.held else None
        if model is None:
            wrong = f"model {header.model}, of which nothing lies here"
        elif header.layer >= len(model.kinds):
            wrong = f"layer {header.layer} of {len(model.kinds)}"
        elif end.row_bytes != model.row_bytes:
            wrong = f"rows of {end.row_bytes} bytes, not {model.row_bytes}"
        elif header.rows > exchange.bucket_rows[-1]:
            wrong = f"{header.rows} rows; {exchange.bucket_rows[-1]} fit"
        else:
            return bisect.bisect_left(exchange.bucket_rows, header.rows)
        raise LaneError(f"attention rank {end.attention_rank}, lane {end.lane}: dispatched {wrong}")

    def _device_is_done(self, lane: int, state: _Lane) -> Callable[[], bool]:
        """Returns a condition: that everything launched on the lane so far has ended."""
        self._launcher.fence(lane)
        state.on_device = True
        return lambda: self._launcher.finished(lane)

    def _tell(
        self, lane: int, step: GPUStepArguments, stage: GPUStage, layer: int, start: int
    ) -> None:
        if self._watch is not None and self._watch.on:
            self._launcher.synchronize(lane)
            self._watch.part(lane, step, stage, layer, start)


def _at_once() -> bool:
    return True


def _ffn_stage(model: ModelStages, layer: int) -> GPUStage:
    return GPUStage.MOE_FFN if model.kinds[layer] else GPUStage.DENSE_FFN


def _stopped(step: GPUStepArguments, done: int) -> bool:
    """Whether a row's token in step ``done`` of the lease is one of the row's stop tokens."""
    if not step.stops:
        return False
    ends = _array(step.stop_ends, step.wanted)
    stops = _array(step.stops, int(ends[-1]))
    tokens = _array(step.tokens + 4 * done * step.wanted, step.wanted)
    begin = 0
    for token, end in zip(tokens, ends, strict=True):
        if token in stops[begin:end]:
            return True
        begin = end
    return False


def _array(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))
