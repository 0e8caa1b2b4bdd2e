"""Watches a server from a process of its own while others send hostile requests: streams that run
all the time, ``/health`` every 50 ms, and memory of two processes every 50 ms."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from benchmark.front_door.exchange import LOOPBACK, head

HEALTH_SECONDS = 0.05
_LAG_SECONDS = 0.01
_NOTED = 0.02
"""Seconds from which a wait is noted down."""
_GIVEN_UP = 120.0
"""Seconds after which a connection without a byte is opened anew."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Window:
    """What was seen since a moment. Times are in seconds, memory in bytes."""

    gap: float
    """Longest time between two pieces of any stream, also of one that has not come yet."""
    health: float
    """Longest time to an answer of ``/health``, also of one that has not come yet."""
    unhealthy: int
    """Number of answers of ``/health`` that were not 200, and of connections lost."""
    lag: float
    """Longest time that the observer itself came too late: the part of the above that the machine
    is to blame for, not the server."""
    broken: int
    """Streams that ended before their last token."""
    running: int
    """Streams that are running now."""
    pieces: int
    http_bytes: int
    """Most resident memory of the HTTP process."""
    scheduler_bytes: int


class Observer:
    """Runs the observing process within a ``with``."""

    def __init__(
        self,
        port: int,
        models: Sequence[str],
        streams: int,
        http: int,
        scheduler: int,
        *,
        tokens: int = 3500,
    ) -> None:
        """``http`` and ``scheduler`` are process ids. A stream has between half of ``tokens`` and
        ``tokens`` tokens, and is followed by another."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        plan = _Plan(port, tuple(models), streams, tokens, (http, scheduler))
        self._process = context.Process(target=_observe, args=(other, plan), daemon=True)

    def __enter__(self) -> Observer:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def since(self, moment: float) -> Window:
        """Return what was seen since ``moment`` of the monotonic clock."""
        self._pipe.send(moment)
        window = self._pipe.recv()
        assert isinstance(window, Window)
        return window

    def wait_running(self, streams: int, timeout: float) -> bool:
        """Wait until ``streams`` streams run and ``/health`` answers. Return whether they do."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            moment = time.monotonic()
            time.sleep(0.5)
            seen = self.since(moment)
            if seen.running >= streams and seen.health < 0.4 and seen.gap < 1.0:
                return True
        return False


@dataclass(frozen=True)
class _Plan:
    """What the observing process watches."""

    port: int
    models: tuple[str, ...]
    streams: int
    tokens: int
    pids: tuple[int, int]


@dataclass
class _Stream:
    last: float = 0.0
    """Time of the last piece; 0 before the first."""


@dataclass
class _Notes:
    streams: list[_Stream]
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """Times at which a wait ended, and how long it was."""
    health: list[tuple[float, float]] = field(default_factory=list)
    lag: list[tuple[float, float]] = field(default_factory=list)
    asked: float = 0.0
    """Time of the question to ``/health`` that is not answered yet; 0 where there is none."""
    unhealthy: list[float] = field(default_factory=list)
    broken: list[float] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    pieces: int = 0

    def window(self, moment: float) -> Window:
        now = time.monotonic()
        running = [stream for stream in self.streams if stream.last]
        memory = [row for row in self.memory if row[0] >= moment] or self.memory[-1:]
        pieces, self.pieces = self.pieces, 0
        return Window(
            gap=max([_longest(self.gaps, moment), *(now - s.last for s in running)]),
            health=max(_longest(self.health, moment), now - self.asked if self.asked else 0.0),
            unhealthy=sum(when >= moment for when in self.unhealthy),
            lag=_longest(self.lag, moment),
            broken=sum(when >= moment for when in self.broken),
            running=len(running),
            pieces=pieces,
            http_bytes=max((row[1] for row in memory), default=0),
            scheduler_bytes=max((row[2] for row in memory), default=0),
        )


def _longest(waits: list[tuple[float, float]], moment: float) -> float:
    return max((wait for when, wait in waits if when >= moment), default=0.0)


def _observe(pipe: Connection, plan: _Plan) -> None:
    import uvloop

    uvloop.run(_main(pipe, plan))


async def _main(pipe: Connection, plan: _Plan) -> None:
    notes = _Notes([_Stream() for _ in range(plan.streams)])
    asyncio.get_running_loop().add_reader(
        pipe.fileno(), lambda: pipe.send(notes.window(pipe.recv()))
    )
    await asyncio.gather(
        *(_stream(notes, index, plan) for index in range(plan.streams)),
        _ask_health(notes, plan.port),
        _sample(notes, plan.pids),
    )


async def _stream(notes: _Notes, index: int, plan: _Plan) -> None:
    rng = random.Random(index)
    stream, path = notes.streams[index], f"/m/{plan.models[index % len(plan.models)]}/generate"
    while True:
        prompt = [rng.randrange(3, 500) for _ in range(16)]
        length = rng.randrange(plan.tokens // 2, plan.tokens)
        sampling = {"max_new_tokens": length, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        try:
            await _read_stream(notes, stream, plan.port, path, body)
        except (OSError, TimeoutError, EOFError):
            notes.broken.append(time.monotonic())
            await asyncio.sleep(0.5)
        stream.last = 0.0


async def _read_stream(
    notes: _Notes, stream: _Stream, port: int, path: str, body: dict[str, Any]
) -> None:
    """Read a stream to its end. Raises EOFError where it ends early."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        writer.write(head(path, len(data)) + data)
        tail = b""
        while True:
            part = await asyncio.wait_for(reader.read(1 << 16), _GIVEN_UP)
            now = time.monotonic()
            tail = (tail + part)[-1024:]
            if b"[DONE]" in tail:
                return
            if not part or b'"error":' in tail or tail.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
                raise EOFError
            if stream.last and now - stream.last > _NOTED:
                notes.gaps.append((now, now - stream.last))
            if stream.last or b"output_ids" in tail:
                stream.last = now
                notes.pieces += 1
    finally:
        writer.close()


async def _ask_health(notes: _Notes, port: int) -> None:
    question = f"GET /health HTTP/1.1\r\nHost: {LOOPBACK}\r\n\r\n".encode()
    while True:
        try:
            notes.asked = time.monotonic()
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            while True:
                notes.asked = time.monotonic()
                writer.write(question)
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _GIVEN_UP)
                length = int(answer.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
                await reader.readexactly(length)
                now = time.monotonic()
                notes.health.append((now, now - notes.asked))
                if b" 200 " not in answer[:16]:
                    notes.unhealthy.append(now)
                asked, notes.asked = notes.asked, 0.0
                await asyncio.sleep(max(0.0, asked + HEALTH_SECONDS - now))
        except (OSError, TimeoutError, EOFError, ValueError):
            now = time.monotonic()
            notes.unhealthy.append(now)
            if notes.asked:
                notes.health.append((now, now - notes.asked))
            with contextlib.suppress(UnboundLocalError):
                writer.close()
            await asyncio.sleep(HEALTH_SECONDS)


async def _sample(notes: _Notes, pids: tuple[int, int]) -> None:
    """Note memory, and how much too late this process comes by itself."""
    next_look = 0.0
    while True:
        before = time.monotonic()
        if before >= next_look:
            http, scheduler = (_resident(pid) for pid in pids)
            notes.memory.append((before, http, scheduler))
            next_look = before + HEALTH_SECONDS
        await asyncio.sleep(_LAG_SECONDS)
        late = time.monotonic() - before - _LAG_SECONDS
        if late > _NOTED:
            notes.lag.append((time.monotonic(), late))


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0
