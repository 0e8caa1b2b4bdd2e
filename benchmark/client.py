"""Replays a load open-loop: every request is sent at its time, whatever became of those before it.
With ``at_once`` the load is closed-loop.

The client reads streams of the native ``/generate`` and notes when each piece came. It decodes the
pieces afterwards, so that it takes little of the server's cores."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp

from benchmark.workload import Request

TIMEOUT = 300.0
"""Seconds after which a request counts as failed."""
STREAM_FLAGS = ("--incremental-streaming-output",)
"""Flags that the server must have: pieces then carry only what is new."""

_DATA = b"data: "


@dataclass
class Answer:
    """Outcome of one request. Times are in seconds from the load's start."""

    request: Request
    sent: float = 0.0
    status: int = 0
    """HTTP status; 0 without a response."""
    tokens: list[int] = field(default_factory=list)
    pieces: list[tuple[float, int]] = field(default_factory=list)
    """Time of each piece of the stream, and the number of its tokens."""
    done: float = 0.0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    retry_after: int | None = None
    error: str = ""
    """Reason why the output is not complete; empty for complete outputs and for 429."""

    @property
    def complete(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def refused(self) -> bool:
        return self.status == 429

    @property
    def ttft(self) -> float:
        """Seconds from the arrival to the first token. Only complete outputs have it."""
        return self.pieces[0][0] - self.request.arrival

    @property
    def tbt(self) -> list[float]:
        """Seconds between pieces. A piece of several tokens counts once, with the whole gap before
        it, which is what a reader waits for."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.pieces)]


@dataclass(frozen=True)
class Replay:
    """Outcomes of a load's requests, in the order of the load."""

    answers: list[Answer]
    seconds: float
    """Seconds from the load's start to its last outcome."""
    started: float
    """Start of the load on the monotonic clock."""
    client_cpu_s: float

    @property
    def lateness(self) -> list[float]:
        """Seconds by which each request was sent late."""
        return [answer.sent - answer.request.arrival for answer in self.answers]


def replay(url: str, load: Sequence[Request], at_once: int | None = None) -> Replay:
    """Send ``load`` to the server at ``url`` and wait for every outcome.

    ``at_once`` bounds the open requests: the next one waits, past its arrival, until one has ended.
    None is no bound."""
    gc.collect()
    gc.disable()  # a collection here would look like the server's pause
    try:
        cpu = time.process_time()
        answers, raw, start = asyncio.run(_replay(url, load, at_once or len(load)))
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu
    finally:
        gc.enable()
    for answer, events in zip(answers, raw, strict=True):
        _decode(answer, events)
    return Replay(answers, seconds, start, cpu)


_Events = list[tuple[float, bytes]]


async def _replay(
    url: str, load: Sequence[Request], at_once: int
) -> tuple[list[Answer], list[_Events], float]:
    answers = [Answer(request) for request in load]
    raw: list[_Events] = [[] for _ in load]
    bodies = [
        json.dumps(
            {"input_ids": r.prompt, "sampling_params": r.sampling(), "stream": True}
        ).encode()
        for r in load
    ]
    gate = asyncio.Semaphore(at_once)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        start = time.perf_counter()

        async def one(index: int) -> None:
            answer = answers[index]
            async with gate:
                await asyncio.sleep(start + answer.request.arrival - time.perf_counter())
                answer.sent = time.perf_counter() - start
                try:
                    await _exchange(session, bodies[index], answer, raw[index], start)
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    answer.error = f"{type(error).__name__}: {error}"
                answer.done = time.perf_counter() - start

        await asyncio.gather(*(one(index) for index in range(len(load))))
        return answers, raw, start


async def _exchange(
    session: aiohttp.ClientSession, body: bytes, answer: Answer, events: _Events, start: float
) -> None:
    headers = {"Content-Type": "application/json"}
    path = f"/m/{answer.request.model}/generate"
    async with session.post(path, data=body, headers=headers) as response:
        if response.status != 200:
            text = await response.text()
            retry_after = response.headers.get("Retry-After")
            answer.retry_after = None if retry_after is None else int(retry_after)
            answer.status = response.status
            if not answer.refused:
                answer.error = text
            return
        async for line in response.content:
            if line.startswith(_DATA):
                events.append((time.perf_counter() - start, line))
        answer.status = response.status


def _decode(answer: Answer, events: _Events) -> None:
    """Fill in what the ``events`` of the stream say."""
    if answer.status != 200 or answer.error:
        return
    reason = None
    for when, line in events:
        data = line[len(_DATA) :].strip()
        if data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = str(event["error"])
            return
        if event["output_ids"]:
            answer.pieces.append((when, len(event["output_ids"])))
            answer.tokens += event["output_ids"]
        meta = event["meta_info"]
        answer.cached_tokens = meta["cached_tokens"]
        answer.prompt_tokens = meta["prompt_tokens"]
        reason = meta["finish_reason"] or reason
    if reason is None or reason["type"] == "abort":
        answer.error = f"ended by {reason}"
    elif len(answer.tokens) != answer.request.output_tokens:
        answer.error = f"{len(answer.tokens)} tokens of {answer.request.output_tokens}"
