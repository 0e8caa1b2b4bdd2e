"""Errors over HTTP, in the shape that OpenAI's clients read."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Send

from crosspool.frontend.refusal import Refusal

RETRY_AFTER_SECONDS = 1
"""What clients are told where the scheduler names no time."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
}


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class RequestError(HTTPException):
    """Ends a request with an HTTP error. ``code`` is OpenAI's, where it has one."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(status, message)
        self.code = code


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for HTTPException."""
    del request
    assert isinstance(error, HTTPException)
    code = error.code if isinstance(error, RequestError) else None
    return error_response(error.status_code, error.detail, code, headers=error.headers)


def error_response(
    status: int,
    message: str,
    code: str | None = None,
    retry_after: int | None = None,
    headers: Any = None,
) -> Response:
    """``retry_after`` is in seconds; None where nobody can tell."""
    response = JSON({"error": _error(status, message, code)}, status, headers)
    response.headers.update(_retry_after(status, retry_after))
    return response


def _error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    return {
        "message": message,
        "type": _TYPES.get(status, "api_error"),
        "param": None,
        "code": code or status,
    }


def _retry_after(status: int, seconds: int | None) -> dict[str, str]:
    """The header Retry-After, for errors that pass by themselves."""
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return {"retry-after": str(seconds or RETRY_AFTER_SECONDS)}
    return {}


class ErrorShaper:
    """A ``send`` that gives errors of SGLang's routes the ``error`` object that OpenAI's clients
    look for, beside SGLang's own fields, and gives 429 and 503 a Retry-After header.

    A stream begins with its first event. If the request was ``refused`` before that, the client
    gets the error's status, as if it had not asked for a stream. All that is no error passes
    through as it comes."""

    def __init__(self, send: Send, refused: Refusal) -> None:
        self._send = send
        self._refused = refused
        self._start: Message | None = None
        """The start of a response that is held back: an error's until its body is whole, a
        stream's until its first event."""
        self._body = b""
        self._over = False
        self.status = 0
        """HTTP status of the response; 0 before it has begun."""

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
            await self._send_error(self._start, message)
        else:
            await self._send_first_event(self._start, message)

    async def _send_first_event(self, start: Message, message: Message) -> None:
        self._start = None
        if not self._refused.status:
            await self._send(start)
            await self._send(message)
            return
        self._over = True
        self.status = self._refused.status
        response = error_response(
            self.status, self._refused.message, retry_after=self._refused.retry_after
        )
        await self._send(
            {"type": "http.response.start", "status": self.status, "headers": response.raw_headers}
        )
        await self._send({"type": "http.response.body", "body": response.body})

    async def _send_error(self, start: Message, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = _with_error(self.status, self._body)
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"] = str(len(body))
        headers.update(_retry_after(self.status, self._refused.retry_after))
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})


def _is_stream(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


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
        data["error"] = _error(status, error)
    elif isinstance(error, dict):
        data["error"] = {**_error(status, str(error.get("message", ""))), **error}
    return msgspec.json.encode(data)
