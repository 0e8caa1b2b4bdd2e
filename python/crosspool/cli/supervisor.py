"""Starts processes, watches them, and stops them in order, so that none is ever left behind."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile, islice

from crosspool.cli.child import Child, ProcessSpec
from crosspool.cli.forked import ForkServer
from crosspool.cli.loss import Loss
from crosspool.cli.restarts import Restarts
from crosspool.cli.signals import Signals
from crosspool.config.process import CANNOT_SERVE, USER_MISTAKE, adopt_orphans

_POLL_SECONDS = 0.1
"""Longest time between two looks at the processes; the end of one ends it."""
_CHECK_SECONDS = 0.3
_STOPPED_SECONDS = 2.0
"""Time for which a process that can be started again may be stopped by a signal before it counts
as lost."""
_STOP_SECONDS = 15.0
"""Time that a process gets to end after SIGTERM, before SIGKILL."""


@dataclass(frozen=True)
class _Start:
    """A process that is to be started in the place of one that has died."""

    spec: ProcessSpec
    due: float


class Supervisor:
    """Runs a set of processes as one.

    ``stages`` are the processes in the order in which they are stopped; those of one stage are
    stopped together. They are started from the last stage to the first, without waiting for one
    another. A fork server is started with the first process that it forks, and stays; if it is lost
    while no process is asked of it, it is started again when one is, or at once if it is ``kept``.
    ``is_ready`` is called again and again until it returns True; then ``on_ready`` is called once.
    A loss before that ends all processes, unless ``is_ready``, called at once, returns True.
    A restartable process that is lost later is started again as ``restarts`` says, and
    ``on_restart`` is called before; ``is_back`` is then called again and again until it returns
    True for the new one. All others of its group are ended and started again with it; this counts
    once. One that ``takes_later`` ends the processes of later stages, of which new ones are started
    with it. One that ends with status 2, a user's mistake, or 3, another's failure, is
    not started again.
    ``on_loss`` is called for every other process that is lost later; the others then go on for
    ``failure_grace`` seconds, unless the lost one was of the first stage.

    A process that a signal stops for two seconds counts as lost if it can be started again.
    ``on_stop`` is called when a signal stops one that cannot, and when that continues; if it stays
    stopped for ``watchdog_timeout`` seconds, it counts as lost. ``hangs`` is called again and again
    with the devices whose processes a signal has stopped, and returns the devices and incarnations
    that hang, with what they do not do; they count as lost. ``elsewhere`` is called again and again
    and returns what is lost on other hosts and does not come back. When the processes are stopped,
    the first stage gets ``drain_timeout`` seconds to end; after a signal, those of the other stages
    are replaced as before until it has ended, since it may still need them. ``say`` prints a line
    for the user."""

    def __init__(
        self,
        stages: Sequence[Sequence[ProcessSpec]],
        *,
        restarts: Restarts,
        is_ready: Callable[[], bool],
        is_back: Callable[[ProcessSpec], bool],
        on_ready: Callable[[], None],
        on_restart: Callable[[Loss], None],
        on_loss: Callable[[Loss], None],
        on_stop: Callable[[ProcessSpec, bool], None],
        hangs: Callable[[Collection[str]], Mapping[tuple[str, int], str]],
        elsewhere: Callable[[], Sequence[Loss]] = tuple,
        say: Callable[[str], None],
        watchdog_timeout: float,
        failure_grace: float,
        drain_timeout: float,
    ) -> None:
        self._stages = stages
        self._fork_servers = {
            spec.forked_by.name: ForkServer(spec.forked_by)
            for stage in stages
            for spec in stage
            if spec.forked_by is not None
        }
        self._restarts = restarts
        self._is_ready = is_ready
        self._is_back = is_back
        self._on_ready = on_ready
        self._on_restart = on_restart
        self._on_loss = on_loss
        self._on_stop = on_stop
        self._hangs = hangs
        self._elsewhere = elsewhere
        self._say = say
        self._watchdog_timeout = watchdog_timeout
        self._failure_grace = failure_grace
        self._drain_timeout = drain_timeout
        self._children: list[list[Child]] = [[] for _ in stages]
        self._stopped: dict[str, float] = {}
        """When each process was stopped that a signal has stopped, by name."""
        self._starts: dict[str, _Start] = {}
        """Processes that wait for their start after a death, by name."""
        self._not_back: dict[str, ProcessSpec] = {}
        """Processes that were started again and are not ready yet, by name."""
        self._latest: dict[str, int] = {}
        """The incarnation of each process that has been replaced, by name; no fork server's, which
        have none."""
        self._ready = False
        self._draining = False
        """Whether the first stage has been asked to end, and the others have not."""
        self._signals = Signals()

    def run(self) -> int:
        """Returns the exit status: 0 after SIGTERM or SIGINT, 2 when a process ended with 2 (a
        mistake of the user, of which it has printed a message), else 1."""
        with self._signals.caught():
            try:
                self._start()
                losses = self._watch()
                if losses:
                    self._say("stopping the other processes")
                    self._stop(_STOP_SECONDS)
                    mistakes = [loss for loss in losses if loss.status == USER_MISTAKE]
                    return 2 if mistakes else 1
                self._say(
                    "stopping once requests in flight are done; a second signal stops at once"
                )
                # Requests may have come in since the last call.
                self._draining = self._ready or self._is_ready()
                self._stop(self._drain_timeout)
                return 0
            finally:
                self._kill_all()

    def replace_all(self, incarnation: Callable[[ProcessSpec], int]) -> bool:
        """Ends all processes but the fork servers, and has others started in their places, of the
        incarnations that ``incarnation`` tells; returns whether it could. It cannot before all are
        ready, and while a fork server owes a process; ``elsewhere`` may call it."""
        for server in self._fork_servers.values():
            self._take_over(server.collect())
        if not self._ready or any(server.is_needed for server in self._fork_servers.values()):
            return False
        running = [child for child in self._all_children() if child.spec.name not in self._starts]
        for child in running:
            child.signal(signal.SIGKILL)
        for child in running:
            child.reap()
        planned = [s.spec for s in self._starts.values() if s.spec.name not in self._fork_servers]
        now = time.monotonic()
        for spec in [*(child.spec for child in running), *planned]:
            self._plan_start(dataclasses.replace(spec, incarnation=incarnation(spec)), now)
        return True

    def _start(self) -> None:
        if self._fork_servers:
            adopt_orphans()
        for stage in reversed(self._stages):
            for spec in stage:
                self._start_one(spec)

    def _start_one(self, spec: ProcessSpec) -> None:
        if spec.forked_by is None:
            self._stage(spec).append(spec.spawn())
        else:
            self._fork_servers[spec.forked_by.name].fork(spec)

    def _watch(self) -> list[Loss]:
        """Returns the losses, or an empty list when a signal asks to stop."""
        next_check = 0.0
        losses: list[Loss] = []
        deadline = float("inf")
        while not self._signals.stops and time.monotonic() < deadline:
            for loss in self._losses_now(losses):
                # Requests may have come in since the last call.
                self._ready = self._ready or self._is_ready()
                if self._is_past(loss) or (self._ready and not losses and self._replaces(loss)):
                    continue
                losses.append(loss)
                self._say(loss.cause)
                if not self._ready or self._is_of_first_stage(loss.spec):
                    deadline = 0.0
                else:
                    self._on_loss(loss)
                    deadline = min(deadline, time.monotonic() + self._failure_grace)
            if not losses and time.monotonic() >= next_check:
                if not self._ready and self._is_ready():
                    self._ready = True
                    self._on_ready()
                self._look_for_returns()
                next_check = time.monotonic() + _CHECK_SECONDS
            if self._ready:
                self._look_for_stopped()
                self._end_stopped_fork_servers()
            self._wait_for_news([] if losses else self._starts.values())
        return losses

    def _is_of_first_stage(self, spec: ProcessSpec) -> bool:
        return spec.name in [first.name for first in self._stages[0]]

    def _wait_for_news(self, starts: Iterable[_Start]) -> None:
        """Returns when it is time to look at the processes again, at the latest when one of
        ``starts`` is due."""
        due = min((start.due for start in starts), default=math.inf)
        seconds = min(_POLL_SECONDS, max(0.0, due - time.monotonic()))
        tellers = [server.teller for server in self._fork_servers.values()]
        self._signals.wait([teller for teller in tellers if teller is not None], seconds)

    def _losses_now(self, known: Sequence[Loss]) -> list[Loss]:
        """Starts what is due; returns what is lost here and not ``known``, or if nothing is, what
        is lost on other hosts: of those, too, the scheduler is told, which may just have died."""
        lost = [*self._start_due(known), *self._new_losses(known)]
        return lost if lost or known else list(self._elsewhere())

    def _new_losses(self, known: Sequence[Loss]) -> list[Loss]:
        lost = self._adopt_forked()
        names = {*self._starts, *(loss.spec.name for loss in known)}
        now = time.monotonic()
        hangs = self._hangs({child.spec.device or "" for child in self._stopped_children()})
        for child in self._all_children():
            spec = child.spec
            if spec.name in names or (self._draining and self._is_of_first_stage(spec)):
                continue
            patience = _STOPPED_SECONDS if self._can_replace(spec) else self._watchdog_timeout
            if spec.is_told_to_end and child.has_ended() and child.reap() == 0:
                continue
            if child.has_ended():
                lost.append(Loss(spec=spec, status=child.reap(), pid=child.pid))
            elif now - self._stopped.get(spec.name, now) >= patience:
                lost.append(Loss(spec=spec, status=None, pid=child.pid))
            elif (hang := hangs.get((spec.device or "", spec.incarnation))) is not None:
                lost.append(Loss(spec=spec, status=None, pid=child.pid, hang=hang))
        return lost

    def _stopped_children(self) -> Iterator[Child]:
        return (child for child in self._all_children() if child.spec.name in self._stopped)

    def _all_children(self) -> Iterator[Child]:
        for stage in self._children:
            yield from stage

    def _can_replace(self, spec: ProcessSpec) -> bool:
        return spec.restartable and self._restarts.limit > 0

    def _replaces(self, loss: Loss) -> bool:
        """Has the lost process started again, unless there is no use in it; returns whether it
        is."""
        name, group = loss.spec.name, loss.spec.group
        if not self._can_replace(loss.spec) or loss.status in (USER_MISTAKE, CANNOT_SERVE):
            return False
        others = [
            child.spec
            for child in self._all_children()
            if group is not None and child.spec.group == group and child.spec.name != name
        ]
        losses = [loss, *(Loss(spec=spec, status=None, lost_with=name) for spec in others)]
        names = [one.spec.name for one in losses]
        was_ready = self._not_back.keys().isdisjoint(names)
        wait = self._restarts.wait(group or name, was_ready=was_ready)
        if wait is None:
            return False
        for child in self._all_children():
            if child.spec.name in names:
                child.reap()  # it may live
        due = time.monotonic() + wait
        for one in losses:
            self._say(f"{one.cause}; it is started again (restart {one.spec.incarnation})")
            self._on_restart(one)
            self._plan_start(one.spec.again(), due)
            if one.spec.takes_later:
                self._replace_later_than(one.spec, due)
        return True

    def _plan_start(self, spec: ProcessSpec, due: float) -> None:
        self._not_back.pop(spec.name, None)
        self._stopped.pop(spec.name, None)
        if spec.name not in self._fork_servers:
            self._latest[spec.name] = spec.incarnation
        self._starts[spec.name] = _Start(spec, due)

    def _replace_later_than(self, spec: ProcessSpec, due: float) -> None:
        """Ends the processes of the stages behind that of ``spec``, and has others started.

        Those that do not run are about to be started, and have not spoken to the dead process: fork
        servers tell of a process before it does anything."""
        for server in self._fork_servers.values():
            self._take_over(server.collect())
        places = zip(self._stages, self._children, strict=True)
        behind = dropwhile(lambda place: spec.name not in [s.name for s in place[0]], places)
        later = chain.from_iterable(children for _, children in islice(behind, 1, None))
        running = [child for child in later if child.spec.name not in self._starts]
        for child in running:
            child.signal(signal.SIGKILL)
        for child in running:
            child.reap()
            self._plan_start(child.spec.again(), due)

    def _is_past(self, loss: Loss) -> bool:
        """Whether another process has taken, or is to take, the place of the lost one already."""
        return loss.spec.incarnation < self._latest.get(loss.spec.name, 1)

    def _start_due(self, known: Sequence[Loss]) -> list[Loss]:
        """Starts the processes whose time has come, unless the others are about to end; returns
        those that cannot be started."""
        lost = []
        now = time.monotonic()
        for start in [] if known else list(self._starts.values()):
            if start.due > now:
                continue
            spec = start.spec
            del self._starts[spec.name]
            self._not_back[spec.name] = spec
            try:
                self._start_again(spec)
            except OSError as error:  # no memory for it, say
                self._say(f"{spec.name} cannot be started: {error.strerror}")
                lost.append(Loss(spec=spec, status=1))
        return lost

    def _start_again(self, spec: ProcessSpec) -> None:
        if spec.name in self._fork_servers:
            self._fork_servers[spec.name].start()
            return
        stage = self._stage(spec)
        stage[:] = [child for child in stage if child.spec.name != spec.name]
        self._start_one(spec)

    def _look_for_returns(self) -> None:
        for name, spec in list(self._not_back.items()):
            if name not in self._starts and self._is_back(spec):
                del self._not_back[name]

    def _look_for_stopped(self) -> None:
        for child in self._all_children():
            name, stopped = child.spec.name, child.is_stopped()
            if stopped and name not in self._stopped:
                self._stopped[name] = time.monotonic()
            elif not stopped and name in self._stopped:
                del self._stopped[name]
            else:
                continue
            self._say(f"{name} {'was stopped by a signal' if stopped else 'continues'}")
            if not self._can_replace(child.spec):
                self._on_stop(child.spec, stopped)

    def _end_stopped_fork_servers(self) -> None:
        """Kills those that a signal has stopped for too long while they are missed."""
        now = time.monotonic()
        for name, server in self._fork_servers.items():
            if not (self._is_missed(server) and server.is_stopped):
                self._stopped.pop(name, None)
            elif now - self._stopped.setdefault(name, now) >= _STOPPED_SECONDS:
                server.kill()

    def _adopt_forked(self) -> list[Loss]:
        """Takes over what the fork servers have forked; returns the losses of those that have ended
        and are missed."""
        lost = []
        for server in self._fork_servers.values():
            children, status = server.poll()
            self._take_over(children)
            if status is None:
                continue
            loss = Loss(spec=server.spec, status=status)
            if self._is_missed(server):
                lost.append(loss)
            else:
                self._say(f"{loss.cause}; it is started again when it is needed")
        return lost

    def _is_missed(self, server: ForkServer) -> bool:
        return server.is_needed or (server.spec.kept and self._can_replace(server.spec))

    def _take_over(self, children: Sequence[Child]) -> None:
        for child in children:
            self._stage(child.spec).append(child)

    def _stage(self, spec: ProcessSpec) -> list[Child]:
        """The processes of the stage of ``spec``."""
        for stage, children in zip(self._stages, self._children, strict=True):
            if spec.name in [one.name for one in stage]:
                return children
        raise ValueError(f"{spec.name} is in no stage")

    def _stop(self, first_stage_seconds: float) -> None:
        stops = self._signals.stops
        losses: list[Loss] = []
        if not self._draining:
            self._end_fork_servers()
        for index, stage in enumerate(self._children):
            deadline = time.monotonic() + (first_stage_seconds if index == 0 else _STOP_SECONDS)
            for child in stage:
                child.signal(signal.SIGTERM)
                child.signal(signal.SIGCONT)
            while not all(child.has_ended() for child in stage):
                if self._signals.stops > stops:
                    return
                if time.monotonic() > deadline:
                    late = ", ".join(c.spec.name for c in stage if not c.has_ended())
                    self._say(f"killing {late}, which did not end after SIGTERM")
                    break
                if self._draining and not losses:
                    losses += self._replace_while_draining()
                    self._wait_for_news(self._starts.values())
                else:
                    time.sleep(_POLL_SECONDS)
            for child in stage:
                child.reap()
            if self._draining:
                self._draining = False
                self._end_fork_servers()

    def _replace_while_draining(self) -> list[Loss]:
        """Has lost processes started again, except those of the first stage; returns the losses of
        others that are not, since nothing can be done about them."""
        lost = []
        for loss in self._losses_now([]):
            if self._is_of_first_stage(loss.spec) or self._is_past(loss) or self._replaces(loss):
                continue
            lost.append(loss)
            self._say(loss.cause)
            self._on_loss(loss)
        self._look_for_stopped()
        self._end_stopped_fork_servers()
        return lost

    def _end_fork_servers(self) -> None:
        for server in self._fork_servers.values():
            self._take_over(server.end())

    def _kill_all(self) -> None:
        self._end_fork_servers()
        for stage in self._children:
            for child in stage:
                child.reap()
