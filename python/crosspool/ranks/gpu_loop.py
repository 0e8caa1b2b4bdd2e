"""What drives the stages of a GPU's lanes: the face that both loops have, and the one in Python.

:class:`crosspool.kernels.cuda_loop.CudaLoop` is resident: the device launches the stages itself.
:class:`HostLaunchedLoop` launches the same ones from here, one by one: the reference, and the
baseline of the ablation. Both take the same steps and answer with the same events.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from crosspool.kernels.cuda_loop import ModelStages, Stage
from crosspool.kernels.cuda_loop_structs import StepArguments
from crosspool.kernels.engine_structs import DONE, LOGITS, TOKENS, Event

if TYPE_CHECKING:
    from crosspool.ranks.gpu_launch import Launcher

_SLEEP = 20e-6
"""Seconds between two looks at lanes that all wait for the device."""


class DeviceLoop(Protocol):
    """As :class:`crosspool.kernels.cuda_loop.CudaLoop`, where the methods are described."""

    def push_step(self, lane: int, arguments: StepArguments) -> None: ...

    def push_resume(self, lane: int, step: int) -> None: ...

    def push_recall(self, lane: int, step: int) -> None: ...

    def pop(self) -> Event | None: ...

    def wait(self, timeout_s: float) -> bool: ...

    def quiesced(self) -> contextlib.AbstractContextManager[None]: ...

    def close(self) -> None: ...


class PartWatch(Protocol):
    """Told of every part, for a trace."""

    @property
    def on(self) -> bool: ...

    def part(self, lane: int, step: StepArguments, stage: Stage, layer: int, start_ns: int) -> None:
        """A part that has just ended on the device."""


@dataclass
class _Lane:
    queue: deque[StepArguments] = field(default_factory=deque)
    step: StepArguments | None = None
    part: int = 0
    """The next one: attention and FFN part of each layer in turn, then the head."""
    done: int = 0
    """Steps of the lease that have ended."""
    fenced: bool = False
    """Everything was launched."""
    with_host: bool = False
    recalled: bool = False


class HostLaunchedLoop:
    """Launches the stages of each lane from Python, lanes in turn, a part at a time; work is done
    in :meth:`wait` only. A lane whose last part is launched is looked at until the device is done
    with it."""

    def __init__(
        self,
        models: Sequence[ModelStages],
        lanes: int,
        launcher: Launcher,
        watch: PartWatch | None = None,
    ) -> None:
        self._models = models
        self._lanes = [_Lane() for _ in range(lanes)]
        self._launcher = launcher
        self._watch = watch
        self._events: deque[Event] = deque()
        self._next = 0

    def push_step(self, lane: int, arguments: StepArguments) -> None:
        self._lanes[lane].queue.append(arguments)

    def push_resume(self, lane: int, step: int) -> None:
        state = self._lanes[lane]
        if not state.with_host or state.step is None or state.step.step != step:
            raise RuntimeError(f"lane {lane}: step {step} does not wait for the host")
        state.with_host = False
        self._end(lane, state)

    def push_recall(self, lane: int, step: int) -> None:
        state = self._lanes[lane]
        if state.step is not None and state.step.step == step:
            state.recalled = True
        for waiting in state.queue:
            if waiting.step == step:
                waiting.lease = 1

    def pop(self) -> Event | None:
        return self._events.popleft() if self._events else None

    def wait(self, timeout_s: float) -> bool:
        """Launches the next part of a lane that has one, or looks until one can go on; True when
        there is an event."""
        deadline = time.monotonic() + timeout_s
        while not self._events and not self._advance_one():
            if time.monotonic() >= deadline:
                break
            time.sleep(_SLEEP)
        return bool(self._events)

    @contextlib.contextmanager
    def quiesced(self) -> Iterator[None]:
        """Nothing of a loop waits on the device: what was launched ends by itself."""
        yield

    def close(self) -> None:
        """Waits for what was launched."""
        for lane in range(len(self._lanes)):
            self._launcher.synchronize(lane)

    def _advance_one(self) -> bool:
        for _ in self._lanes:
            lane = self._next
            self._next = (lane + 1) % len(self._lanes)
            if self._advance(lane, self._lanes[lane]):
                return True
        return False

    def _advance(self, lane: int, state: _Lane) -> bool:
        """Does what is next on a lane; False: nothing can be done."""
        if state.with_host:
            return False
        if state.step is None:
            if not state.queue:
                return False
            state.step, state.done, state.recalled = state.queue.popleft(), 0, False
            self._begin(lane, state, Stage.EMBED)
        if state.fenced:
            if not self._launcher.finished(lane):
                return False
            state.fenced = False
            self._finish(lane, state)
            return True
        self._launch_part(lane, state)
        return True

    def _begin(self, lane: int, state: _Lane, stage: Stage) -> None:
        assert state.step is not None
        state.part = 0
        self._launcher.write(lane, state.step.inputs, state.step.rows, state.done)
        self._launcher.launch(lane, state.step.model, stage, state.step.bucket)

    def _launch_part(self, lane: int, state: _Lane) -> None:
        step = state.step
        assert step is not None
        kinds = self._models[step.model].kinds
        layer, ffn = divmod(state.part, 2)
        start = time.monotonic_ns()
        if layer < len(kinds):
            stage = Stage.ATTENTION
            if ffn:
                stage = Stage.MOE_FFN if kinds[layer] else Stage.DENSE_FFN
            else:
                self._launcher.set_layer(lane, layer)
            self._launcher.launch(lane, step.model, stage, step.bucket)
            state.part += 1
            self._tell(lane, step, stage, layer, start)
            if state.part < 2 * len(kinds) or step.wanted:
                return
        elif step.wanted:
            self._launcher.set_layer(lane, layer)
            self._launcher.launch(lane, step.model, Stage.HEAD, step.bucket)
            self._launcher.fetch(lane, step.tokens + 4 * state.done * step.wanted, step.wanted)
            self._tell(lane, step, Stage.HEAD, -1, start)
        self._launcher.fence(lane)
        state.fenced = True

    def _tell(self, lane: int, step: StepArguments, stage: Stage, layer: int, start: int) -> None:
        if self._watch is not None and self._watch.on:
            self._launcher.synchronize(lane)
            self._watch.part(lane, step, stage, layer, start)

    def _finish(self, lane: int, state: _Lane) -> None:
        """The device is done with a step, or with one of a lease."""
        step = state.step
        assert step is not None
        if step.for_host:
            state.with_host = True
            self._events.append(Event(LOGITS, lane, step.step, 0, step.wanted, None))
            return
        more = state.done + 1 < step.lease and not state.recalled and not state.queue
        if not more or _stopped(step, state.done):
            self._end(lane, state)
            return
        self._events.append(Event(TOKENS, lane, step.step, state.done, step.wanted, None))
        state.done += 1
        self._begin(lane, state, Stage.FEED)

    def _end(self, lane: int, state: _Lane) -> None:
        assert state.step is not None
        self._events.append(Event(DONE, lane, state.step.step, state.done, state.step.wanted, None))
        state.step = None


def _stopped(step: StepArguments, done: int) -> bool:
    """Whether a row's token of the lease's step ``done`` is one of the row's stop tokens."""
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
