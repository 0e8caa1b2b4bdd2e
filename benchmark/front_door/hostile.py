"""Sends every hostile request while streams of all models run, and holds each to the bounds."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import psutil

from benchmark import machine
from benchmark.front_door import hostile_bodies, hostile_sockets
from benchmark.front_door.exchange import Outcome
from benchmark.front_door.hostile_bodies import Place, Row
from benchmark.front_door.observer import Observer, Window
from benchmark.records import Recorder
from benchmark.server import TINY_MODELS, Server

FLAGS = ("--kv-pool-bytes", "256MiB", "--incremental-streaming-output")
STREAMS = 20
GAP_LIMIT = 0.5
"""Longest good time in seconds between two pieces of another client's stream."""
HEALTH_LIMIT = 0.1
"""Longest good time in seconds to an answer of ``/health``."""
MEMORY_LIMIT = 200 << 20
"""Bytes by which the HTTP process may grow."""
REFUSED_WITHIN = 2.0
"""Seconds within which a request that is refused must have its answer."""
SPENT_WITHIN = 10.0
"""Seconds within which a request must have its answer that is refused once it has used up a budget
of processor time. Of that a grammar may take 3.25 s for 200 tokens: 0.75 s to be compiled, 10 ms
for each token, and 0.5 s beyond. The streams have the processors, too."""
_TIMED = ("crosspool::http", "crosspool::scheduler")
_BEFORE_SECONDS = 3.0
_AFTER_SECONDS = 2.0
_RECOVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Verdict:
    """A row, and what it did to the server."""

    name: str
    known: bool
    outcome: Outcome
    before: Window
    during: Window
    lost: tuple[str, ...]
    """Titles of processes that ended."""
    recovered: bool
    """Whether all streams ran again afterwards."""
    seconds: float
    """Time of the window ``during``."""
    http_cpu: float
    """CPU seconds that the HTTP process used in that time."""
    scheduler_cpu: float
    """CPU seconds that the scheduler used in that time."""
    refused_within: float = REFUSED_WITHIN
    """Seconds within which a refusal had to come."""

    @property
    def growth(self) -> int:
        """Bytes by which the HTTP process grew."""
        return self.during.http_bytes - self.before.http_bytes

    @property
    def faults(self) -> list[str]:
        """Bounds that do not hold, without what the observer itself came too late."""
        late = self.during.lag
        checks = {
            "processes lost": bool(self.lost),
            "answer": not self.outcome.answered_well(self.refused_within),
            "stream gap": self.during.gap - late > GAP_LIMIT,
            "health": self.during.health - late >= HEALTH_LIMIT or self.during.unhealthy > 0,
            "memory": self.growth >= MEMORY_LIMIT,
            "streams broken": self.during.broken > 0,
        }
        return [name for name, failed in checks.items() if failed]


def refused_within(row: Row, outcome: Outcome) -> float:
    """Return the seconds within which ``row`` has to be refused, if it is. One that needs about as
    much as its budget has as long as using that up takes, provided that it is refused for it."""
    spent = row.budget is not None and f"`{row.budget}`" in outcome.note
    return SPENT_WITHIN if spent else REFUSED_WITHIN


def rows() -> Iterator[Row]:
    """Yield every row, one at a time, since bodies are large."""
    return itertools.chain(
        hostile_bodies.known_rows(),
        hostile_sockets.known_clients(),
        hostile_bodies.own_rows(),
        hostile_sockets.own_clients(),
    )


class Bench:
    """A server with its observer, started anew after a row that it does not get over."""

    def __init__(self, flags: Sequence[str] = FLAGS, streams: int = STREAMS) -> None:
        self._flags, self._streams = flags, streams
        self.server: Server | None = None
        self._observer: Observer | None = None

    def __enter__(self) -> Bench:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.server = Server(self._flags).__enter__()
        self._titles = self.server.processes()
        http = self._titles["crosspool::http"].pid
        scheduler = self._titles["crosspool::scheduler"].pid
        self._observer = Observer(self.server.port, TINY_MODELS, self._streams, http, scheduler)
        self._observer.__enter__()
        if not self._observer.wait_running(self._streams, 60):
            raise RuntimeError(f"the streams do not run:\n{self.server.log[-4000:]}")

    def stop(self) -> None:
        if self._observer is not None:
            self._observer.__exit__()
        if self.server is not None:
            self.server.stop_at_once()
        self.server = self._observer = None

    def judge(self, row: Row) -> Verdict:
        """Send ``row``'s request and return what came of it. Starts a new server where this one
        does not get over it."""
        assert self.server is not None and self._observer is not None
        place = Place(self.server.port, TINY_MODELS)
        moment = time.monotonic()
        time.sleep(_BEFORE_SECONDS)
        before = self._observer.since(moment)
        moment = time.monotonic()
        used = [self._cpu(title) for title in _TIMED]
        try:
            outcome = row.send(place)
        except OSError as error:
            outcome = Outcome(
                0, time.monotonic() - moment, f"{type(error).__name__}: {error}", False
            )
        time.sleep(_AFTER_SECONDS)
        during = self._observer.since(moment)
        seconds = time.monotonic() - moment
        http, scheduler = (self._cpu(title) - cpu for title, cpu in zip(_TIMED, used, strict=True))
        lost = tuple(t for t, process in self._titles.items() if not process.is_running())
        recovered = not lost and self._observer.wait_running(self._streams, _RECOVERY_SECONDS)
        if not recovered:
            # The wait of those that were still silent belongs to this row.
            during = during if lost else self._observer.since(moment)
            self.stop()
            self.start()
        return Verdict(
            row.name,
            row.known,
            outcome,
            before,
            during,
            lost,
            recovered,
            seconds,
            http,
            scheduler,
            refused_within(row, outcome),
        )

    def _cpu(self, title: str) -> float:
        """CPU seconds of the process ``title`` so far; NaN where it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            times = self._titles[title].cpu_times()
            return float(times.user + times.system)
        return float("nan")


def run(only: Sequence[str], told: Callable[[Verdict], None], recorder: Recorder) -> list[Verdict]:
    """Judge the rows of which the name contains one of ``only``; all where it is empty."""
    verdicts = []
    with Bench() as bench:
        for row in rows():
            if only and not any(word in row.name for word in only):
                continue
            load1, cpu, began = machine.load1(), os.times(), time.monotonic()
            verdict = bench.judge(row)
            used = os.times()
            verdicts.append(verdict)
            told(verdict)
            recorder.add(
                row.name,
                [verdict.outcome.seconds],
                "s",
                parameters={"streams": STREAMS, "known": row.known},
                status=verdict.outcome.status,
                answer=verdict.outcome.note[:200],
                before=asdict(verdict.before),
                during=asdict(verdict.during),
                http_growth_bytes=verdict.growth,
                lost=list(verdict.lost),
                recovered=verdict.recovered,
                faults=verdict.faults,
                http_cpu_s=verdict.http_cpu,
                scheduler_cpu_s=verdict.scheduler_cpu,
                window_s=verdict.seconds,
                load1=load1,
                cpu_s=used.user + used.system - cpu.user - cpu.system,
                wall_s=time.monotonic() - began,
            )
    return verdicts
