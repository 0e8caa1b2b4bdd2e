"""Sends a workload open-loop: every request at its time, whatever became of those before it.

Times are those of SGLang's ``bench_serving``: they begin when a request is sent; the time to first
token ends with the first piece of the stream that has text, a time between tokens lies between two
such pieces, and the end-to-end time ends with the stream's last line.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from crosspool.bench.record import RequestRecord
from crosspool.bench.workload import TimedRequest

_DATA = b"data:"
_DONE = b"[DONE]"
_LINE_BYTES = 1 << 20
_SHOWN = 300
"""Characters of a server's words that a record keeps."""
_LOOK_SECONDS = 0.01
"""Time between two looks at how late the client's loop runs."""


class BenchError(RuntimeError):
    """The server cannot be asked; the message says why, and has no key."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The server, and how requests are put to it."""

    url: str
    """It has no slash at its end, and no ``/v1``."""
    api_key: str | None = field(default=None, repr=False)
    chat: bool = False
    """Whether requests go to ``/v1/chat/completions`` instead of ``/v1/completions``."""
    ignore_eos: bool = False
    """Whether requests carry SGLang's and vLLM's ``ignore_eos``."""
    timeout: float = 600.0
    """Seconds after which a request counts as failed."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, request: TimedRequest) -> bytes:
        body: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body | dict(self.more))

    def session(self) -> aiohttp.ClientSession:
        limits = aiohttp.ClientTimeout(total=self.timeout, sock_connect=min(30.0, self.timeout))
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=limits,
            headers=headers,
            read_bufsize=_LINE_BYTES,
        )


@dataclass
class Sending:
    """What came of a workload."""

    records: list[RequestRecord]
    """Those of the requests that were sent, in their order."""
    seconds: float = 0.0
    """Time from the start to the last outcome."""
    lags: list[float] = field(default_factory=list)
    """Seconds by which the client's loop ran late, looked at every 10 ms."""
    cpu_s: float = 0.0
    """CPU seconds of the client."""
    interrupted: bool = False


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Piece(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text) or (
            delta is not None and bool(delta.content or delta.reasoning_content or delta.reasoning)
        )


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Tokens(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _StreamEvent(msgspec.Struct):
    choices: list[_Piece] = []
    usage: _Tokens | None = None
    error: Any = None


class _ServedCard(msgspec.Struct):
    id: str


class _ServedCards(msgspec.Struct):
    data: list[_ServedCard]


_DECODER = msgspec.json.Decoder(_StreamEvent)


async def models_of(endpoint: Endpoint) -> list[str]:
    """Returns the names of the models that the server lists. Raises BenchError."""
    limits = aiohttp.ClientTimeout(total=30)
    try:
        async with (
            endpoint.session() as session,
            session.get(
                endpoint.url + "/v1/models", timeout=limits, allow_redirects=False
            ) as answer,
        ):
            content = await answer.read()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise BenchError(
            f"{endpoint.url} does not answer: {error or 'no answer in time'}"
        ) from None
    if answer.status != 200:
        raise BenchError(f"{endpoint.url}/v1/models answers with HTTP status {answer.status}")
    try:
        cards = msgspec.json.decode(content, type=_ServedCards).data
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BenchError(f"{endpoint.url}/v1/models does not answer with a list") from None
    return [card.id for card in cards]


async def send(
    endpoint: Endpoint,
    workload: Sequence[TimedRequest],
    told: Callable[[RequestRecord], object] = lambda record: None,
) -> Sending:
    """Sends the workload and waits for every outcome, at most the endpoint's timeout past the last
    request. ``told`` is called with the record of each request that has ended. An interrupt ends
    the open requests and sends no more."""
    sending = Sending([])
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    gc.collect()
    gc.freeze()  # a collection over the whole workload would look like the server's pause
    cpu = time.process_time()
    start = time.perf_counter()
    watch = asyncio.create_task(_watch(sending.lags))
    try:
        async with endpoint.session() as session:
            sender = asyncio.create_task(
                _send_all(session, endpoint, workload, sending, start=start, told=told)
            )
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait([sender, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not sender.done():
                sending.interrupted = True
                sender.cancel()
            await asyncio.gather(sender, return_exceptions=sending.interrupted)
    finally:
        watch.cancel()
        gc.unfreeze()
        loop.remove_signal_handler(signal.SIGINT)
    sending.seconds = time.perf_counter() - start
    sending.cpu_s = time.process_time() - cpu
    return sending


async def _watch(lags: list[float]) -> None:
    while True:
        due = time.perf_counter() + _LOOK_SECONDS
        await asyncio.sleep(_LOOK_SECONDS)
        lags.append(max(0.0, time.perf_counter() - due))


async def _send_all(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    workload: Sequence[TimedRequest],
    sending: Sending,
    *,
    start: float,
    told: Callable[[RequestRecord], object],
) -> None:
    async with asyncio.TaskGroup() as tasks:
        for request in workload:
            body = endpoint.body(request)
            await asyncio.sleep(max(0.0, start + request.arrival - time.perf_counter()))
            record = RequestRecord(
                model=request.model,
                arrival=request.arrival,
                wanted_prompt_tokens=request.prompt_tokens,
                max_tokens=request.max_tokens,
            )
            sending.records.append(record)
            tasks.create_task(_send_one(session, endpoint, body, record, start=start, told=told))


async def _send_one(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    body: bytes,
    record: RequestRecord,
    *,
    start: float,
    told: Callable[[RequestRecord], object],
) -> None:
    began = time.perf_counter()
    record.sent = began - start
    try:
        await _exchange(session, endpoint, body, record, began)
    except TimeoutError:
        record.fail("timeout")
    except aiohttp.ClientError as error:
        record.fail("connection", f"{type(error).__name__}: {error}"[:_SHOWN])
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        record.fail("unreadable stream", str(error)[:_SHOWN])
    except asyncio.CancelledError:
        record.fail("interrupted")
        raise
    finally:
        record.e2e = time.perf_counter() - began if record.e2e is None else record.e2e
        told(record)


async def _exchange(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    body: bytes,
    record: RequestRecord,
    began: float,
) -> None:
    url = endpoint.url + endpoint.path
    latest = 0.0
    ended = False
    async with session.post(url, data=body, allow_redirects=False) as answer:
        record.status = answer.status
        if answer.status != 200:
            text = await answer.text(errors="replace")
            record.fail(f"HTTP {answer.status}", text[:_SHOWN])
            return
        async for line in answer.content:
            now = time.perf_counter() - began
            if not line.startswith(_DATA):
                continue
            record.e2e = now
            data = line[len(_DATA) :].strip()
            if data == _DONE:
                ended = True
                continue
            event = _DECODER.decode(data)
            if event.error is not None:
                record.fail("error in the stream", str(event.error)[:_SHOWN])
                return
            if event.usage is not None:
                _count(record, event.usage)
            for piece in event.choices:
                record.finish_reason = piece.finish_reason or record.finish_reason
                if not piece.has_text:
                    continue
                if record.ttft is None:
                    record.ttft = now
                else:
                    record.tbt.append(now - latest)
                latest = now
    if not ended:
        record.fail("the stream ended early")
    elif record.ttft is None:
        record.fail("no text")


def _count(record: RequestRecord, usage: _Tokens) -> None:
    record.prompt_tokens = usage.prompt_tokens
    record.output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        record.cached_tokens = usage.prompt_tokens_details.cached_tokens
