"""What the process that compiles grammars does: a child for each grammar, in two lanes.

Two children work at most, one in each lane. In the first lane a grammar gets a short time, which
nearly all need less than; one that needs more goes on in the second if that is free, and otherwise
begins anew there in its turn. In each lane models take turns. So a grammar that never ends holds an
ordinary one up for :data:`_FIRST_SECONDS`.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NoReturn

import msgspec
import psutil

from crosspool.config.deployment import ModelConfig
from crosspool.config.process import die_with_parent, set_title
from crosspool.config.sizes import exact_size
from crosspool.server.grammar_library import GrammarCompiler, next_mask
from crosspool.server.grammar_matcher import first_mask_problem
from crosspool.server.grammar_messages import (
    AddCompiler,
    Cancel,
    CompilerAdded,
    GrammarResult,
    Job,
    RemoveCompiler,
    decode_to_process,
    encode,
)

MakesModelCompiler = Callable[[int, ModelConfig], GrammarCompiler]
"""Makes the compiler of the model with this number."""

_FIRST_SECONDS = 0.25
_CLOCK_SHARE = 1 / 2
"""Times are processor times, since others may have the cores. But such a share of the clock counts,
too, so that a client has its answer soon."""
_STARVED_FACTOR = 3
"""The clock counts for at most so many times the processor time, lest a simple grammar is refused
where its child got none."""
_STARVED_SHARE = 1 / 20
"""The share of the clock that counts in any case."""
_LOOK_SECONDS = 0.005
"""Shortest time between two looks at the processor time of a child."""
_ERROR_CHARACTERS = 500
"""Some messages of the compiler have the whole grammar in them."""
_NICENESS = 5
"""What takes long leaves processors to the ranks."""


@dataclass(frozen=True, kw_only=True)
class CompileLimits:
    """What one grammar may take; the options ``grammar_timeout``, ``grammar_memory_bytes`` and
    ``grammar_mask_timeout``."""

    seconds: float
    memory_bytes: int
    mask_seconds: float

    @property
    def too_long(self) -> str:
        return (
            f"it took longer than {self.seconds:g} s to compile, the server's `grammar_timeout`; "
            "make it simpler"
        )

    @property
    def too_large(self) -> str:
        return (
            f"compiling it takes more memory than {exact_size(self.memory_bytes)}, the server's "
            "`grammar_memory_bytes`; make it simpler"
        )


class _FairQueue:
    """Jobs of several models, which take turns."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[int, deque[Job]] = OrderedDict()

    def push(self, job: Job) -> None:
        self._jobs.setdefault(job.model, deque()).append(job)

    def pop(self) -> Job | None:
        if not self._jobs:
            return None
        model, jobs = self._jobs.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._jobs[model] = jobs
        return job

    def remove(self, number: int) -> None:
        for model, jobs in list(self._jobs.items()):
            left = deque(job for job in jobs if job.id != number)
            if left:
                self._jobs[model] = left
            else:
                del self._jobs[model]

    def remove_model(self, model: int) -> None:
        self._jobs.pop(model, None)


@dataclass(frozen=True, kw_only=True)
class _Child:
    """A process that compiles one grammar."""

    job: Job
    pid: int
    result: Connection
    started: float
    """Time of the monotonic clock."""

    def left(self, seconds: float) -> float:
        """How long it may go on before it has used up ``seconds``."""
        times = psutil.Process(self.pid).cpu_times()
        used = float(times.user + times.system)
        clock = time.monotonic() - self.started
        slowly = min(_CLOCK_SHARE * clock, _STARVED_FACTOR * used)
        return seconds - max(used, slowly, _STARVED_SHARE * clock)

    def end(self) -> int:
        """Kills and reaps it; returns its wait status."""
        os.kill(self.pid, signal.SIGKILL)
        self.result.close()
        return os.waitpid(self.pid, 0)[1]


@dataclass(kw_only=True)
class _Lane:
    seconds: float
    queue: _FairQueue = field(default_factory=_FairQueue)
    child: _Child | None = None


class GrammarChildren:
    """Compiles what the ``scheduler`` sends, with the ``compilers`` of models by number and what
    ``make`` makes of further ones."""

    def __init__(
        self,
        scheduler: Connection,
        compilers: dict[int, GrammarCompiler],
        make: MakesModelCompiler,
        limits: CompileLimits,
    ) -> None:
        self._scheduler = scheduler
        self._compilers = compilers
        self._make = make
        self._limits = limits
        self._lanes = [_Lane(seconds=min(_FIRST_SECONDS, limits.seconds))]
        if limits.seconds > _FIRST_SECONDS:
            self._lanes.append(_Lane(seconds=limits.seconds))

    def run(self) -> None:
        """Returns when the scheduler has closed its end."""
        while True:
            for lane in self._lanes:
                if lane.child is None and (job := lane.queue.pop()) is not None:
                    lane.child = self._fork(job)
            busy = [(lane, lane.child) for lane in self._lanes if lane.child is not None]
            left = [child.left(lane.seconds) for lane, child in busy]
            sleep = max(_LOOK_SECONDS, min(left)) if left else None
            readable = wait([self._scheduler, *(child.result for _, child in busy)], sleep)
            for lane, following in zip(self._lanes, [*self._lanes[1:], None], strict=True):
                self._look(lane, following, readable)
            if self._scheduler in readable and not self._take():
                return

    def _take(self) -> bool:
        """Takes one message; returns False when there will be none."""
        try:
            message = decode_to_process(self._scheduler.recv_bytes())
        except (EOFError, OSError):
            return False
        match message:
            case Job():
                self._lanes[0].queue.push(message)
            case Cancel():
                for lane in self._lanes:
                    lane.queue.remove(message.id)
                self._end_children(lambda job: job.id == message.id)
            case AddCompiler():
                self._scheduler.send_bytes(encode(self._add(message)))
            case RemoveCompiler():
                self._remove(message.model)
        return True

    def _end_children(self, whose: Callable[[Job], bool]) -> None:
        for lane in self._lanes:
            if lane.child is not None and whose(lane.child.job):
                lane.child.end()
                lane.child = None

    def _add(self, message: AddCompiler) -> CompilerAdded:
        try:
            self._compilers[message.model] = self._make(message.model, message.config)
        except Exception as error:  # of a library, over the files of a user
            return CompilerAdded(model=message.model, error=str(error) or repr(error))
        return CompilerAdded(model=message.model)

    def _remove(self, model: int) -> None:
        for lane in self._lanes:
            lane.queue.remove_model(model)
        self._end_children(lambda job: job.model == model)
        self._compilers.pop(model, None)
        gc.collect()

    def _look(self, lane: _Lane, following: _Lane | None, readable: Sequence[object]) -> None:
        """Takes the result of the lane's child, or ends it when its time is over."""
        child = lane.child
        if child is None:
            return
        frame = None
        if child.result in readable:
            try:
                frame = child.result.recv_bytes()
                child.end()
            except EOFError:
                status = child.end()
                if os.WTERMSIG(status) == signal.SIGKILL and not child.job.was_killed:
                    lane.queue.push(msgspec.structs.replace(child.job, was_killed=True))
                else:
                    frame = self._encode(child.job, error=self._cause(status))
        elif child.left(lane.seconds) > 0:
            return
        elif following is None:
            child.end()
            frame = self._encode(child.job, error=self._limits.too_long)
        elif following.child is None:
            os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
            following.child = child
        else:
            child.end()
            following.queue.push(child.job)
        lane.child = None
        if frame is not None:
            self._scheduler.send_bytes(frame)

    def _cause(self, status: int) -> str:
        """Why a child has ended with this wait status and no result."""
        if os.WTERMSIG(status) == signal.SIGSEGV:
            return "it is nested too deeply"
        return self._limits.too_large

    @staticmethod
    def _encode(job: Job, *, error: str) -> bytes:
        return encode(GrammarResult(id=job.id, error=error))

    def _fork(self, job: Job) -> _Child:
        ours, theirs = Pipe(duplex=False)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._compile(job, parent, theirs)
            finally:
                os._exit(1)
        theirs.close()
        return _Child(job=job, pid=pid, result=ours, started=time.monotonic())

    # --- in the child

    def _compile(self, job: Job, parent: int, result: Connection) -> NoReturn:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        set_title("one grammar")
        self._scheduler.close()
        _bound_memory(self._limits.memory_bytes)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C++ writes there why it aborts
        before = psutil.Process().memory_info().rss
        compiler = self._compilers[job.model]
        try:
            prepared = compiler.prepare(job.grammar)
            first = next_mask(compiler.build(prepared).walk())
            if (problem := first_mask_problem(first, self._limits.mask_seconds)) is not None:
                raise ValueError(problem)
            grown = _most_bytes() - before
            if grown > self._limits.memory_bytes:  # some came from what the heap had free
                raise MemoryError
            made = GrammarResult(id=job.id, first=first, prepared=prepared, grown_bytes=grown)
            frame = encode(made)
        except MemoryError:
            frame = self._encode(job, error=self._limits.too_large)
        except ValueError as error:
            frame = self._encode(job, error=str(error)[:_ERROR_CHARACTERS])
        result.send_bytes(frame)
        os._exit(0)


def _most_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _bound_memory(size: int) -> None:
    """Lets this process take ``size`` bytes more, and makes it the first that Linux ends where
    memory is short."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/oom_score_adj").write_text("1000")
