"""Faults of processes: one is killed, stopped for ever, or slowed down by stopping it again and
again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

WAYS = ("kill", "stop", "slow")
"""``kill``: SIGKILL. ``stop``: SIGSTOP, for ever. ``slow``: stopped and continued, for some time.
"""
VICTIMS = {
    "device": "crosspool::device ",
    "weights": "crosspool::weights ",
    "http": "crosspool::http",
    "scheduler": "crosspool::scheduler",
    "grammars": "crosspool::grammars",
    "detokenizer": "crosspool::detokenizer",
    "front-end": "crosspool::front end",
}
"""How the titles of processes begin that are replaced when they die, by the victims' names."""
KINDS = tuple(f"{way}-{victim}" for victim in VICTIMS for way in WAYS)
_STOP_PATIENCE = 4.0
_LATE = 0.2
_SLOW_SECONDS = (1.0, 3.0)
_STOPPED_SECONDS = (0.02, 0.4)
_RUNNING_SECONDS = (0.01, 0.2)


@dataclass(frozen=True)
class Fault:
    """A fault. Times are of the monotonic clock."""

    kind: str
    process: str
    """Title of the process."""
    pid: int
    began: float

    def ends_after(self, moment: float) -> bool:
        """Whether something may still happen to connections after ``moment``: a stopped process is
        killed seconds later, and a client may notice the end of a connection late."""
        return self.began + (_STOP_PATIENCE if self.kind.startswith("stop") else _LATE) >= moment

    @property
    def cuts(self) -> bool:
        """Whether it ends the connections of an HTTP process."""
        return self.kind in ("kill-http", "stop-http")


def title_of(process: psutil.Process) -> str:
    """Return the title of a process; empty for one that has ended."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return words[0].rpartition("/")[2] if words else ""
    return ""


def processes_titled(launcher: psutil.Process, title: str) -> list[tuple[str, psutil.Process]]:
    """Return the processes below ``launcher`` whose titles begin so, with their titles, in an order
    that does not depend on their ids unless titles are the same."""
    titled = [(title_of(process), process) for process in launcher.children(recursive=True)]
    found = [pair for pair in titled if pair[0].startswith(title)]
    return sorted(found, key=lambda pair: (pair[0], pair[1].pid))


@dataclass
class Injector:
    """Does faults to the processes below ``launcher``. ``rng`` chooses them."""

    launcher: psutil.Process
    rng: random.Random
    kinds: Sequence[str]
    _away: set[str] = field(default_factory=set)
    """Titles of processes that were killed or stopped since all processes were last there."""
    _touched: set[psutil.Process] = field(default_factory=set)
    """Processes that are stopped or slow."""
    _slowing: set[asyncio.Task[None]] = field(default_factory=set)

    def inject(self) -> Fault | None:
        """Do one fault; None where no process of the kind that is drawn is there, or all have had a
        fault since everything was last back. No other kind is drawn then."""
        kind = self.rng.choice(self.kinds)
        way, _, victim = kind.partition("-")
        processes = self._candidates(VICTIMS[victim])
        if not processes:
            return None
        title, process = self.rng.choice(processes)
        with contextlib.suppress(psutil.Error):
            if way != "slow":
                self._away.add(title)
            if way == "kill":
                process.kill()
            elif way == "stop":
                process.suspend()
                self._touched.add(process)
            else:
                self._touched.add(process)
                task = asyncio.create_task(self._slow(process, self.rng.random()))
                self._slowing.add(task)
                task.add_done_callback(self._slowing.discard)
            return Fault(kind, title, process.pid, time.monotonic())
        return None

    def all_back(self) -> None:
        """Note that everything is back. What takes longer to come back than the next fault takes to
        come would never come back otherwise, on a machine that is slow."""
        self._away.clear()

    async def settle(self) -> None:
        """Wait until nothing is slow any more."""
        await asyncio.gather(*self._slowing)

    def _candidates(self, title: str) -> list[tuple[str, psutil.Process]]:
        """Processes that a fault can meet, in an order that does not depend on their ids."""
        found = processes_titled(self.launcher, title)
        return [(t, p) for t, p in found if t not in self._away and p not in self._touched]

    async def _slow(self, process: psutil.Process, seed: float) -> None:
        rng = random.Random(seed)
        end = time.monotonic() + rng.uniform(*_SLOW_SECONDS)
        try:
            while time.monotonic() < end:
                process.suspend()
                await asyncio.sleep(rng.uniform(*_STOPPED_SECONDS))
                process.resume()
                await asyncio.sleep(rng.uniform(*_RUNNING_SECONDS))
        except psutil.Error:
            return  # it has died meanwhile
        finally:
            self._touched.discard(process)
            with contextlib.suppress(psutil.Error):
                process.resume()
