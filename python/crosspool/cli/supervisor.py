"""Starts processes, watches them, and stops them in order, so that none is ever left behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from crosspool.cli.child import Child, ProcessSpec
from crosspool.cli.forked import ForkServer
from crosspool.config.process import adopt_orphans

_POLL_SECONDS = 0.1
_CHECK_SECONDS = 0.3
_STOP_SECONDS = 15.0
"""Time that a process gets to end after SIGTERM, before SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A process that ended although nobody had asked it to end, or that does nothing any more."""

    spec: ProcessSpec
    status: int | None
    """Its exit status; None if a signal has stopped it, for too long."""

    @property
    def cause(self) -> str:
        if self.status is None:
            return f"{self.spec.name} was stopped by a signal and did not continue in time"
        if self.status < 0:
            return f"{self.spec.name} was killed by {signal.Signals(-self.status).name}"
        return f"{self.spec.name} exited with status {self.status}"


class Supervisor:
    """Runs a set of processes as one.

    ``stages`` are the processes in the order in which they are stopped; those of one stage are
    stopped together. They are started from the last stage to the first, without waiting for one
    another. Those that are also in ``forked`` come from the fork server, which is started last and
    stays; if it is lost while no process is asked of it, it is started again when one is.
    ``is_ready`` is called again and again until it returns True; then ``on_ready`` is called once.
    A loss before that ends all processes, unless ``is_ready``, called at once, returns True.
    ``on_loss`` is called for every process that is lost later; the others then go on for
    ``failure_grace`` seconds, unless the lost one was of the first stage. ``on_stop`` is called
    when a signal stops a process after that, and when it continues; one that stays stopped for
    ``watchdog_timeout`` seconds counts as lost. When the processes are stopped, the first stage
    gets ``drain_timeout`` seconds to end. ``say`` prints a line for the user."""

    def __init__(
        self,
        stages: Sequence[Sequence[ProcessSpec]],
        *,
        fork_server: ProcessSpec | None = None,
        forked: Sequence[ProcessSpec] = (),
        is_ready: Callable[[], bool],
        on_ready: Callable[[], None],
        on_loss: Callable[[Loss], None],
        on_stop: Callable[[ProcessSpec, bool], None],
        say: Callable[[str], None],
        watchdog_timeout: float,
        failure_grace: float,
        drain_timeout: float,
    ) -> None:
        self._stages = stages
        self._fork_server = ForkServer(fork_server) if fork_server is not None else None
        self._forked = forked
        self._is_ready = is_ready
        self._on_ready = on_ready
        self._on_loss = on_loss
        self._on_stop = on_stop
        self._say = say
        self._watchdog_timeout = watchdog_timeout
        self._failure_grace = failure_grace
        self._drain_timeout = drain_timeout
        self._children: list[list[Child]] = [[] for _ in stages]
        self._stopped: dict[str, float] = {}
        """When each process was stopped that a signal has stopped, by name."""
        self._signals = 0

    def run(self) -> int:
        """Returns the exit status: 0 after SIGTERM or SIGINT, 2 when a process ended with 2 (a
        mistake of the user, of which it has printed a message), else 1."""
        with self._catching_signals():
            try:
                self._start()
                losses = self._watch()
                if losses:
                    self._say("stopping the other processes")
                    self._stop(_STOP_SECONDS)
                    return 2 if any(loss.status == 2 for loss in losses) else 1
                self._say(
                    "stopping once requests in flight are done; a second signal stops at once"
                )
                self._stop(self._drain_timeout)
                return 0
            finally:
                self._kill_all()

    def _start(self) -> None:
        for index in reversed(range(len(self._stages))):
            for spec in self._stages[index]:
                if spec not in self._forked:
                    self._children[index].append(spec.spawn())
        if self._fork_server is not None:
            adopt_orphans()
            for spec in reversed(self._forked):
                self._fork_server.fork(spec)

    def _watch(self) -> list[Loss]:
        """Returns the losses, or an empty list when a signal asks to stop."""
        ready = False
        next_check = 0.0
        losses: list[Loss] = []
        deadline = float("inf")
        while not self._signals and time.monotonic() < deadline:
            for loss in self._new_losses(losses):
                losses.append(loss)
                self._say(loss.cause)
                # Requests may have come in since the last call.
                ready = ready or self._is_ready()
                if not ready or loss.spec in self._stages[0]:
                    deadline = 0.0
                else:
                    self._on_loss(loss)
                    deadline = min(deadline, time.monotonic() + self._failure_grace)
            if not ready and not losses and time.monotonic() >= next_check:
                ready = self._is_ready()
                if ready:
                    self._on_ready()
                next_check = time.monotonic() + _CHECK_SECONDS
            if ready:
                self._look_for_stopped()
            time.sleep(_POLL_SECONDS)
        return losses

    def _new_losses(self, known: Sequence[Loss]) -> list[Loss]:
        lost = self._adopt_forked()
        names = {loss.spec.name for loss in known}
        now = time.monotonic()
        for child in (child for stage in self._children for child in stage):
            if child.spec.name in names:
                continue
            if child.has_ended():
                lost.append(Loss(spec=child.spec, status=child.reap()))
            elif now - self._stopped.get(child.spec.name, now) >= self._watchdog_timeout:
                lost.append(Loss(spec=child.spec, status=None))
        return lost

    def _look_for_stopped(self) -> None:
        for child in (child for stage in self._children for child in stage):
            name, stopped = child.spec.name, child.is_stopped()
            if stopped and name not in self._stopped:
                self._stopped[name] = time.monotonic()
            elif not stopped and name in self._stopped:
                del self._stopped[name]
            else:
                continue
            self._say(f"{name} {'was stopped by a signal' if stopped else 'continues'}")
            self._on_stop(child.spec, stopped)

    def _adopt_forked(self) -> list[Loss]:
        """Takes over what the fork server has forked; returns its loss if it has ended and somebody
        waits for it."""
        server = self._fork_server
        if server is None:
            return []
        children, status = server.poll()
        for child in children:
            self._children[self._stage_of(child.spec)].append(child)
        if status is None:
            return []
        loss = Loss(spec=server.spec, status=status)
        if server.is_needed:
            return [loss]
        self._say(f"{loss.cause}; it is started again when it is needed")
        return []

    def _stage_of(self, spec: ProcessSpec) -> int:
        names = [[one.name for one in stage] for stage in self._stages]
        return next(index for index, stage in enumerate(names) if spec.name in stage)

    def _stop(self, first_stage_seconds: float) -> None:
        signals = self._signals
        self._end_fork_server()
        for index, stage in enumerate(self._children):
            deadline = time.monotonic() + (first_stage_seconds if index == 0 else _STOP_SECONDS)
            for child in stage:
                child.signal(signal.SIGTERM)
                child.signal(signal.SIGCONT)
            while not all(child.has_ended() for child in stage):
                if self._signals > signals:
                    return
                if time.monotonic() > deadline:
                    late = ", ".join(c.spec.name for c in stage if not c.has_ended())
                    self._say(f"killing {late}, which did not end after SIGTERM")
                    break
                time.sleep(_POLL_SECONDS)
            for child in stage:
                child.reap()

    def _end_fork_server(self) -> None:
        if self._fork_server is not None:
            self._fork_server.end()

    def _kill_all(self) -> None:
        self._end_fork_server()
        for stage in self._children:
            for child in stage:
                child.reap()

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        def count(number: int, frame: FrameType | None) -> None:
            self._signals += 1

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, count) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
