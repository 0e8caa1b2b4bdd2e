"""Small pieces of ASGI: answers, errors in OpenAI's shape, bodies read whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec

from crosspool.frontend.refusal import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

RETRY_AFTER_SECONDS = 1
"""Where the scheduler names no time."""
_JSON = b"application/json"
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
}


class BodyTooLarge(ValueError):
    """The client sent more than the limit."""


async def answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = _JSON,
    headers: Headers | None = None,
) -> None:
    all_headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        *(headers or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


async def answer_json(send: Send, data: Any, status: int = 200) -> None:
    await answer(send, status, msgspec.json.encode(data))


def error_of(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The ``error`` object of an answer as OpenAI's clients read it."""
    return {
        "message": message,
        "type": _ERROR_TYPES.get(status, "api_error"),
        "param": None,
        "code": code or status,
    }


async def answer_error(
    send: Send,
    status: int,
    message: str,
    code: str | None = None,
    retry_after: int | None = None,
) -> None:
    body = msgspec.json.encode({"error": error_of(status, message, code)})
    await answer(send, status, body, headers=_retry_after(status, retry_after))


def _retry_after(status: int, seconds: int | None) -> Headers:
    """Retry-After for the statuses that pass by themselves; ``seconds``: None where nobody can
    tell."""
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return [(b"retry-after", str(seconds or RETRY_AFTER_SECONDS).encode())]
    return []


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body. Raises BodyTooLarge beyond ``limit`` bytes, and ConnectionError when the
    client is gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client disconnected")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"the body is larger than {limit} bytes")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` for an application behind us: the body that was read, then the client's."""
    unread = [body]

    async def replayed() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replayed


def header(scope: Scope, name: bytes) -> str:
    """A request header's value, empty when it is absent."""
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), "")


class ErrorShaper:
    """A ``send`` that gives errors of SGLang's OpenAI routes the ``error`` object that OpenAI's
    clients look for, beside SGLang's own fields, and 429 and 503 a Retry-After header.

    A stream begins with its first event: one that was ``refused`` before it is answered with the
    error's status, as if no stream had been asked for. Every other answer that is no error passes
    through as it comes."""

    def __init__(self, send: Send, refused: Refusal) -> None:
        self._send = send
        self._refused = refused
        self._start: Message | None = None
        """An answer's start that is held back: an error's until its body is whole, a stream's
        until its first event."""
        self._body = b""
        self._over = False
        self.status = 0
        """HTTP status of the answer; 0 before it has begun."""

    async def __call__(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= HTTPStatus.BAD_REQUEST or _is_stream(message):
                self._start = message
                return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        elif self.status >= HTTPStatus.BAD_REQUEST:
            await self._error(self._start, message)
        else:
            await self._first_event(self._start, message)

    async def _first_event(self, start: Message, message: Message) -> None:
        self._start = None
        if self._refused.status:
            self._over = True
            self.status = self._refused.status
            refused = self._refused
            await answer_error(
                self._send, refused.status, refused.message, retry_after=refused.retry_after
            )
            return
        await self._send(start)
        await self._send(message)

    async def _error(self, start: Message, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = _with_error(self.status, self._body)
        kept = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        headers = [*kept, length, *_retry_after(self.status, self._refused.retry_after)]
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _is_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start["headers"]
    )


def _with_error(status: int, body: bytes) -> bytes:
    try:
        data = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body
    if not isinstance(data, dict):
        return body
    if isinstance(data.get("message"), str):
        # FastAPI tells where in SGLang's source the route is; that is not for the client.
        data["message"] = data["message"].partition('\n\n  File "')[0]
    error = data.get("error", data.get("message"))
    if isinstance(error, str):
        data["error"] = error_of(status, error)
    elif isinstance(error, dict):
        data["error"] = {**error_of(status, str(error.get("message", ""))), **error}
    return msgspec.json.encode(data)
