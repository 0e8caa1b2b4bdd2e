"""Sends cases over kept connections, as clients do, and notes every fault: a 5xx, unless it is the
503 of a server that is busy, a hang, a reset, a lost process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp
import psutil
import yarl

from benchmark.front_door.cases import Case

WORKERS = 12
HANG_SECONDS = 10.0
"""Time in which every request must have its whole answer."""
_LOOK_SECONDS = 0.5
_BUSY = ("takes no requests now", "max_connections", "max_total_body_bytes", "shutting down")
"""Parts of messages of a 503 that a server may give. Any other hides a failure of its own."""
_DIGITS = str.maketrans("0123456789", "0" * 10)


@dataclass(frozen=True)
class Answer:
    """What came of a case."""

    status: int
    """HTTP status; 0 without an answer."""
    seconds: float
    fault: str
    """Kind of fault; empty where there is none."""
    note: str

    def signature(self, case: Case) -> tuple[str, str, str]:
        """Return what counts as the same fault: kind, route and beginning of the message."""
        if self.fault == "reset":  # an answer before this one has spoilt the connection
            return self.fault, "", self.note.partition(" http")[0]
        kind = f"{self.fault} {self.status or ''}".strip()
        return kind, _route(case), self.note[:60].translate(_DIGITS)


@dataclass
class Found:
    """A fault, with the smallest case that showed it."""

    case: Case
    answer: Answer
    count: int = 1


@dataclass
class Tally:
    """Counts of a run."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: dict[tuple[str, str, str], Found] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)
    """Memory of each process by title in bytes, at moments spread evenly over the run."""
    lost: list[str] = field(default_factory=list)
    """Titles of processes that ended."""
    unavailable: Counter[str] = field(default_factory=Counter)
    """Messages of the answers with status 503, each with its route."""
    exceptions: Counter[str] = field(default_factory=Counter)
    """Last lines of tracebacks in the servers' logs."""

    @property
    def requests(self) -> int:
        return len(self.seconds)

    def count(self, kind: str) -> int:
        """Return the number of faults of which the kind begins with ``kind``."""
        return sum(found.count for key, found in self.faults.items() if key[0].startswith(kind))

    def add(self, case: Case, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        self.seconds.append(answer.seconds)
        if answer.status == 503:
            self.unavailable[f"{case.method} {_route(case)}: {answer.note[:120]}"] += 1
        if not answer.fault:
            return
        key = answer.signature(case)
        found = self.faults.get(key)
        if found is None:
            self.faults[key] = Found(case, answer)
            return
        found.count += 1
        if len(case.body or b"") < len(found.case.body or b""):
            found.case, found.answer = case, answer

    def join(self, other: Tally) -> None:
        """Add the counts of ``other``."""
        self.statuses += other.statuses
        self.seconds += other.seconds
        self.memory += other.memory
        self.lost += other.lost
        self.unavailable += other.unavailable
        for key, found in other.faults.items():
            if key in self.faults:
                self.faults[key].count += found.count
            else:
                self.faults[key] = found


def fuzz(
    url: str,
    cases: Iterator[Case],
    processes: Sequence[tuple[str, psutil.Process]],
    *,
    looks: int = 1000,
    hang: float = HANG_SECONDS,
) -> Tally:
    """Send ``cases`` until they are used up or one of ``processes``, pairs of a title and a
    process, is lost. Memory is noted every ``looks`` requests; an answer later than ``hang``
    seconds is a fault."""
    return asyncio.run(_fuzz(url, cases, processes, looks, hang))


async def _fuzz(
    url: str,
    cases: Iterator[Case],
    processes: Sequence[tuple[str, psutil.Process]],
    looks: int,
    hang: float,
) -> Tally:
    tally, over, clock = Tally(), asyncio.Event(), _Clock()
    in_flight: list[Case] = []

    async def work(session: aiohttp.ClientSession) -> None:
        for case in cases:
            in_flight.append(case)
            answer = await clock.exchange(session, url, case, hang)
            in_flight.remove(case)
            if over.is_set():
                return
            tally.add(case, answer)
            if tally.requests % looks == 0:
                tally.memory.append(_memory(processes))

    async def look() -> None:
        while not tally.lost:
            tally.lost = [title for title, process in processes if not _alive(process)]
            await asyncio.sleep(0 if tally.lost else _LOOK_SECONDS)
        for case in in_flight:
            answer = Answer(0, 0.0, "process lost", ", ".join(tally.lost))
            tally.faults.setdefault(answer.signature(case), Found(case, answer))
        over.set()

    tally.memory.append(_memory(processes))
    async with session_of() as session:
        looking = asyncio.create_task(look())
        ticking = asyncio.create_task(clock.tick())
        working = [asyncio.create_task(work(session)) for _ in range(WORKERS)]
        left = set(working)
        while left and not over.is_set():
            _, left = await asyncio.wait(left, timeout=_LOOK_SECONDS)
        for task in (looking, ticking, *working):
            task.cancel()
        outcomes = await asyncio.gather(looking, ticking, *working, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):  # the fuzzer's own fault
            raise outcome
    if not tally.lost:
        tally.memory.append(_memory(processes))
    return tally


class _Clock:
    """Knows for how long this process stood still, because others had the cores or the machine was
    stopped: what had no answer in that time may have had no time for one."""

    def __init__(self) -> None:
        self._late = 0.0

    async def tick(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LOOK_SECONDS)
            self._late += max(0.0, time.monotonic() - before - 2 * _LOOK_SECONDS)

    async def exchange(
        self, session: aiohttp.ClientSession, url: str, case: Case, hang: float
    ) -> Answer:
        """What :func:`exchange` does, once more where this process stood still meanwhile."""
        while True:
            late = self._late
            answer = await exchange(session, url, case, hang)
            if answer.fault != "hang":
                return answer
            await asyncio.sleep(2 * _LOOK_SECONDS)  # until the last tick is counted
            if self._late == late:
                return answer


def session_of() -> aiohttp.ClientSession:
    """Return a session that keeps its connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15),
        auto_decompress=False,
        skip_auto_headers=("Content-Type",),
    )


async def exchange(session: aiohttp.ClientSession, url: str, case: Case, hang: float) -> Answer:
    """Send ``case`` and read its whole answer."""
    began = time.monotonic()
    status, text, fault = 0, "", ""
    try:
        async with session.request(
            case.method,
            yarl.URL(url + case.path, encoded=True),
            data=case.body,
            headers=case.headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=hang),
        ) as response:
            status = response.status
            text = (await response.read()).decode(errors="replace")
            fault = _fault(case, status, response.headers.get("Content-Type", ""), text)
    except TimeoutError:
        fault = "hang"
    except (aiohttp.ClientError, OSError) as error:
        fault, text = "reset", f"{type(error).__name__}: {error}"
    except ValueError as error:
        text = f"not sent: {error}"
    return Answer(status, time.monotonic() - began, fault, _message(text))


def _route(case: Case) -> str:
    route = case.path.partition("?")[0]
    return "/m/MODEL/" + route.split("/", 3)[-1] if route.startswith("/m/") else route


def _fault(case: Case, status: int, content_type: str, text: str) -> str:
    if status == 503 and ("/health" in case.path or any(cause in text for cause in _BUSY)):
        return ""
    if status >= 500:
        return "5xx"
    if content_type.startswith("text/event-stream") and '"code":500' in text.replace(" ", ""):
        return "5xx in a stream"
    return ""


def _message(text: str) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    return text[:300]


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _memory(processes: Sequence[tuple[str, psutil.Process]]) -> dict[str, int]:
    found = {}
    for title, process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found[title] = int(process.memory_full_info().uss)
    return found
