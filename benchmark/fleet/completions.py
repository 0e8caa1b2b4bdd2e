"""A client of OpenAI's ``/v1/completions``, for servers of any kind."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp

_DATA = b"data: "
_EOS = 2
"""The end-of-sequence token of :mod:`benchmark.checkpoint`."""


@dataclass(frozen=True)
class Completion:
    """A request for a model."""

    arrival: float
    """Seconds after the load's start."""
    model: str
    prompt: str
    max_tokens: int

    def body(self) -> bytes:
        """Return a body that bars the end of the output before ``max_tokens``."""
        return json.dumps(
            {
                "model": self.model,
                "prompt": self.prompt,
                "max_tokens": self.max_tokens,
                "temperature": 0,
                "logit_bias": {str(_EOS): -100},
                "stream": True,
            }
        ).encode()


@dataclass
class Outcome:
    """What came of a request. Times are in seconds from the load's start."""

    request: Completion
    status: int = 0
    """HTTP status; 0 without a response."""
    times: list[float] = field(default_factory=list)
    """When each piece of the text came."""
    error: str = ""
    """Reason why the output is not complete; empty for complete ones."""

    @property
    def complete(self) -> bool:
        return self.status == 200 and not self.error and bool(self.times)

    @property
    def ttft(self) -> float:
        """Seconds from the arrival to the first piece."""
        return self.times[0] - self.request.arrival

    @property
    def tbt(self) -> list[float]:
        """Seconds between pieces."""
        return [later - earlier for earlier, later in pairwise(self.times)]


@dataclass(frozen=True)
class Sent:
    """Outcomes of a load's requests, in its order."""

    outcomes: list[Outcome]
    started: float
    """Start of the load, as ``time.perf_counter`` has it."""
    seconds: float

    @property
    def complete(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.complete]


def send(url: str, load: Sequence[Completion], timeout: float) -> Sent:
    """Send every request at its time, whatever became of those before it, and wait for all."""
    return asyncio.run(_send(url, load, timeout))


async def _send(url: str, load: Sequence[Completion], timeout: float) -> Sent:
    limits = aiohttp.ClientTimeout(total=timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=limits) as session:
        start = time.perf_counter()

        async def one(request: Completion) -> Outcome:
            await asyncio.sleep(start + request.arrival - time.perf_counter())
            outcome = Outcome(request)
            try:
                await _exchange(session, outcome, start)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                outcome.error = f"{type(error).__name__}: {error}"
            return outcome

        outcomes = await asyncio.gather(*map(one, load))
        return Sent(outcomes, start, time.perf_counter() - start)


async def _exchange(session: aiohttp.ClientSession, outcome: Outcome, start: float) -> None:
    headers = {"Content-Type": "application/json"}
    body = outcome.request.body()
    async with session.post("/v1/completions", data=body, headers=headers) as response:
        outcome.status = response.status
        if response.status != 200:
            outcome.error = await response.text()
            return
        ended = False
        async for line in response.content:
            data = line.removeprefix(_DATA).strip()
            if not line.startswith(_DATA):
                continue
            if data == b"[DONE]":
                ended = True
                continue
            when = time.perf_counter() - start
            event = json.loads(data)
            if "error" in event:
                outcome.error = str(event["error"])
            elif event["choices"] and event["choices"][0]["text"]:
                outcome.times.append(when)
        if not ended and not outcome.error:
            outcome.error = "the stream ended early"
