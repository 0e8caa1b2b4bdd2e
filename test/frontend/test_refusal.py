"""How a refusal becomes an HTTP response, without processes."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import fastapi
import msgspec
import pytest
from crosspool.frontend import refusal
from crosspool.frontend.messages import finish_reason
from crosspool.frontend.refusal import Refusal
from crosspool.frontend.tokenizer_manager import PooledTokenizerManager, Refused, native_api
from crosspool.scheduler.request import Finish
from crosspool.server.errors import ErrorShaper
from starlette.types import Message

FULL = "the queue is full; retry later"
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def shaped(messages: list[Message], refused: Refusal) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body that a client gets of an application's ``messages``."""
    sent: list[Message] = []

    async def run() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        shaper = ErrorShaper(send, refused, "/v1/completions")
        for message in messages:
            await shaper(message)
        await shaper.finish()

    asyncio.run(run())
    start, *bodies = sent
    assert start["type"] == "http.response.start"
    assert all(body["type"] == "http.response.body" for body in bodies)
    assert not bodies[-1].get("more_body")
    headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(body["body"] for body in bodies)


def stream(*events: bytes) -> list[Message]:
    pieces: list[Message] = [
        {"type": "http.response.body", "body": event, "more_body": True} for event in events
    ]
    return [
        {"type": "http.response.start", "status": 200, "headers": EVENT_STREAM},
        *pieces,
        {"type": "http.response.body", "body": b""},
    ]


def test_a_stream_refused_before_its_first_event_is_an_error() -> None:
    status, headers, body = shaped(
        stream(b'data: {"error": {}}\n\n', b"data: [DONE]\n\n"), Refusal(429, FULL, 7)
    )
    assert status == 429
    assert headers["retry-after"] == "7" and headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)
    error = msgspec.json.decode(body)["error"]
    assert error == {"message": FULL, "type": "rate_limit_error", "param": None, "code": 429}


def test_a_stream_that_has_begun_goes_on() -> None:
    refused = Refusal()
    sent: list[Message] = []

    async def run() -> None:
        async def send(message: Message) -> None:
            sent.append(dict(message))

        shaper = ErrorShaper(send, refused, "/v1/completions")
        messages = stream(b"data: 1\n\n", b"data: 2\n\n")
        for message in messages[:2]:
            await shaper(message)
        assert sent == messages[:2]  # nothing is held back once there is an event
        refused.status = 429
        for message in messages[2:]:
            await shaper(message)
        assert sent == messages

    asyncio.run(run())


@pytest.mark.parametrize(("named", "header"), [(12, "12"), (None, "1")])
def test_errors_carry_the_scheduler_s_retry_after(named: int | None, header: str) -> None:
    body = msgspec.json.encode({"object": "error", "message": FULL, "code": 429})
    answer: list[Message] = [
        {"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"9")]},
        {"type": "http.response.body", "body": body},
    ]
    status, headers, shaped_body = shaped(answer, Refusal(429, FULL, named))
    assert (status, headers["retry-after"]) == (429, header)
    assert int(headers["content-length"]) == len(shaped_body)
    assert msgspec.json.decode(shaped_body)["error"]["type"] == "rate_limit_error"


def test_other_errors_name_no_time() -> None:
    answer: list[Message] = [
        {"type": "http.response.start", "status": 400, "headers": []},
        {"type": "http.response.body", "body": b'{"message": "no"}'},
    ]
    assert "retry-after" not in shaped(answer, Refusal())[1]


@pytest.mark.parametrize(
    ("path", "media", "last"),
    [
        ("/v1/completions", b"text/event-stream", rb'data: (\{"error":.*\})\n\n'),
        ("/v1/messages", b"text/event-stream", rb'event: error\ndata: (\{"type":.*\})\n\n'),
        ("/api/chat", b"application/x-ndjson", rb'(\{"error":.*\})\n'),
    ],
)
def test_a_stream_that_fails_says_so_and_ends(path: str, media: bytes, last: bytes) -> None:
    sent: list[Message] = []

    async def run() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        shaper = ErrorShaper(send, Refusal(), path)
        headers = [(b"content-type", media + b"; charset=utf-8")]
        await shaper({"type": "http.response.start", "status": 200, "headers": headers})
        await shaper({"type": "http.response.body", "body": b"1", "more_body": True})
        await shaper.fail(RuntimeError("a secret"))

    asyncio.run(run())
    assert not sent[-1].get("more_body")
    found = re.fullmatch(last, sent[-1]["body"])
    assert found and "midst" in msgspec.json.decode(found[1])["error"]["message"]
    assert b"secret" not in sent[-1]["body"]


@pytest.mark.parametrize("media", [b"application/json", b"text/event-stream"])
def test_what_fails_after_a_whole_response_ends_no_connection(media: bytes) -> None:
    sent: list[Message] = []

    async def run() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        shaper = ErrorShaper(send, Refusal(), "/generate")
        headers = [(b"content-type", media)]
        await shaper({"type": "http.response.start", "status": 200, "headers": headers})
        await shaper({"type": "http.response.body", "body": b"{}"})
        await shaper.fail(RuntimeError("a background task failed"))

    asyncio.run(run())
    assert len(sent) == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((ValueError("x"), 400), (TypeError("x"), 400), (KeyError("x"), 400)),
        *((RecursionError("x"), 400), (OverflowError("x"), 400)),
        *((UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), 400), (OSError("x"), 503)),
        *((RuntimeError("x"), 503), (AssertionError("x"), 503)),
        *((AttributeError("x", obj=[]), 400), (AttributeError("x", obj=asyncio), 503)),
    ],
)
def test_what_an_application_raises(error: Exception, status: int) -> None:
    sent: list[Message] = []

    async def run() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        shaper = ErrorShaper(send, Refusal(), "/generate")
        bare = [(b"content-type", b"text/plain")]
        await shaper({"type": "http.response.start", "status": 500, "headers": bare})
        await shaper({"type": "http.response.body", "body": b"Internal Server Error"})
        await shaper.fail(error)

    asyncio.run(run())
    assert sent[0]["status"] == status
    assert msgspec.json.decode(sent[1]["body"])["error"]["code"] == status


@pytest.mark.parametrize(("status", "becomes"), [(500, 503), (502, 503), (504, 503), (501, 400)])
def test_no_other_status_than_503_says_that_the_server_failed(status: int, becomes: int) -> None:
    """What an application does not do at all is no failure: the client can ask for less."""
    body = msgspec.json.encode({"error": {"message": "it broke", "code": status}})
    answer: list[Message] = [
        {"type": "http.response.start", "status": status, "headers": []},
        {"type": "http.response.body", "body": body},
    ]
    got, headers, text = shaped(answer, Refusal())
    assert got == becomes and ("retry-after" in headers) == (becomes == 503)
    error = msgspec.json.decode(text)["error"]
    assert (error["message"], error["code"]) == ("it broke", becomes)


@pytest.mark.parametrize(
    ("seconds", "whole"), [(0.0, 1), (0.2, 1), (1.0, 1), (2.1, 3), (None, None)]
)
def test_finish_reason_rounds_up(seconds: float | None, whole: int | None) -> None:
    finish = Finish(kind="abort", message=FULL, status=429, retry_after=seconds)
    reason = finish_reason(finish, 0)
    assert reason is not None and reason.get("retry_after") == whole


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_tokenizer_manager_notes_why(native: bool, streaming: bool) -> None:
    finish = Finish(kind="abort", message=FULL, status=429, retry_after=2.5)

    async def run() -> Refusal:
        refused = Refusal()
        refusal.current.set(refused)
        native_api.set(native)
        out: dict[str, Any] = {
            "meta_info": {"finish_reason": finish_reason(finish, 0), "completion_tokens": 0}
        }
        with pytest.raises(Refused if native else fastapi.HTTPException):
            await PooledTokenizerManager.on_abort(SimpleNamespace(), out, None, streaming)
        return refused

    assert asyncio.run(run()) == Refusal(429, FULL, 3)
