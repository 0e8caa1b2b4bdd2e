"""Errors over HTTP, in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Send

from crosspool.frontend.refusal import Refusal

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
"""What clients are told where the scheduler names no time."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error"}
"""Types of errors by HTTP status, where Anthropic's API has other ones than OpenAI's."""
_ANTHROPIC_PATH = "/v1/messages"
_MISTAKES = (
    *(ValueError, TypeError, LookupError, OverflowError, RecursionError),
    msgspec.MsgspecError,
)
"""What applications raise over a request that is wrong: UnicodeError and pydantic's and json's
errors are ValueErrors."""
_VALUES = (bool, int, float, str, bytes, list, dict)
"""Types of a body, and of what JSON brings."""
_EVENTS, _LINES = "text/event-stream", "application/x-ndjson"
"""Content types of the streams of OpenAI's and Anthropic's routes, and of Ollama's."""
_LONGEST_TEXT = 500
"""Characters that a client is told of an error that nobody wrote for it."""
_NAMED_FIELD = re.compile(r"`([\w.\[\]]+)`:? ")
"""How a message begins that is about one field of the request."""


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class RequestError(HTTPException):
    """Ends a request with an HTTP error. ``code`` is OpenAI's, where it has one; ``param`` is the
    field of the request that is wrong, where it is one."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param


def unknown_model(name: str) -> RequestError:
    message = f"The model `{name}` does not exist; GET /v1/models lists those that do."
    return RequestError(404, message, code="model_not_found", param="model")


async def handle_error(request: Request | None, error: Exception) -> Response:
    """Starlette's handler for HTTPException."""
    del request
    assert isinstance(error, HTTPException)
    code, param = (error.code, error.param) if isinstance(error, RequestError) else (None, None)
    headers = error.headers
    return error_response(error.status_code, error.detail, code, param=param, headers=headers)


def error_response(
    status: int,
    message: str,
    code: str | None = None,
    *,
    param: str | None = None,
    retry_after: int | None = None,
    headers: Any = None,
) -> Response:
    """``retry_after`` is in seconds; None where nobody can tell."""
    response = JSON({"error": _error(status, message, code, param)}, status, headers)
    response.headers.update(_retry_after(status, retry_after))
    return response


def _error(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    named = _NAMED_FIELD.match(message)
    return {
        "message": message,
        "type": _type(status),
        "param": param or (named[1] if named else None),
        "code": code or status,
    }


def _type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def _retry_after(status: int, seconds: int | None) -> dict[str, str]:
    """The header Retry-After, for errors that pass by themselves."""
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return {"retry-after": str(seconds or RETRY_AFTER_SECONDS)}
    return {}


class ErrorShaper:
    """A ``send`` that gives errors the shape that the client's library reads, and gives 429 and 503
    a Retry-After header: the ``error`` object of OpenAI's, beside SGLang's own fields, or
    Anthropic's shape on its routes. Of errors with 5xx only 503 leaves the server.

    A stream begins with its first event. If the request was ``refused`` before that, the client
    gets the error's status, as if it had not asked for a stream. All that is no error passes
    through as it comes."""

    def __init__(self, send: Send, refused: Refusal, path: str) -> None:
        """``path`` is the request's, without the model."""
        self._send = send
        self._refused = refused
        self._path = path
        self._start: Message | None = None
        """The start of a response that is held back: an error's until its body is whole, a
        stream's until its first event."""
        self._body = b""
        self._is_whole = False
        """Whether ``_body`` is all of an error that waits for :meth:`finish` or :meth:`fail`."""
        self._over = False
        """Whether all of the response has left."""
        self._media = ""
        """Content type of a response that is no error."""
        self.status = 0
        """HTTP status of the response; 0 before it has begun."""

    async def __call__(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._media = Headers(raw=message["headers"]).get("content-type", "").partition(";")[0]
            if self.status >= HTTPStatus.BAD_REQUEST or self._media == _EVENTS:
                self._start = message
                return
        if self._start is None or message["type"] != "http.response.body":
            self._over = message["type"] == "http.response.body" and not message.get("more_body")
            await self._send(message)
        elif self.status >= HTTPStatus.BAD_REQUEST:
            self._body += message.get("body", b"")
            self._is_whole = not message.get("more_body")
            # SGLang's application sends a bare 500 before it lets an exception go on to fail().
            if self._is_whole and self.status != HTTPStatus.INTERNAL_SERVER_ERROR:
                await self.finish()
        else:
            await self._send_first_event(self._start, message)

    async def finish(self) -> None:
        """Sends an error that is whole and was held back."""
        if not self._is_whole or self._over:
            return
        assert self._start is not None
        headers = MutableHeaders(raw=list(self._start["headers"]))
        if self.status == HTTPStatus.NOT_IMPLEMENTED:
            self.status = HTTPStatus.BAD_REQUEST  # a request can be asked without what it asks for
        elif self.status >= 500 and self.status != HTTPStatus.SERVICE_UNAVAILABLE:
            text = self._body.decode(errors="replace")
            log.error("%s: an application answered %d: %s", self._path, self.status, text)
            self.status = HTTPStatus.SERVICE_UNAVAILABLE
        headers.update(_retry_after(self.status, self._refused.retry_after))
        await self._send_error(self._body, headers)

    async def fail(self, error: Exception) -> None:
        """Answers with ``error``, which ended the request: 400 if it is the client's mistake, and
        503 otherwise. A stream that has begun ends with it. Raises it if part of another response
        has left, which is lost."""
        if self._over or (self.status and self._start is None):
            log.error("%s: a request failed after its answer had begun", self._path, exc_info=error)
            return await self._end_stream(error)
        if isinstance(error, HTTPException):
            response = await handle_error(None, error)
        elif _is_a_mistake(error):
            log.warning("%s: a request ended with %s", self._path, type(error).__name__)
            log.debug("where it was raised", exc_info=error)
            text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            response = error_response(400, f"the request is not valid: {text[:_LONGEST_TEXT]}")
        else:
            log.error("%s: a request failed", self._path, exc_info=error)
            response = error_response(503, "the request failed; the server's log has the cause")
        await self._send_response(response)

    async def _end_stream(self, error: Exception) -> None:
        if self._over:
            return
        event = error_response(503, "the server failed in the midst of this; its log has the cause")
        text = _with_error(503, bytes(event.body), self._path)
        if self._media == _EVENTS:
            kind = b"event: error\n" if self._path.startswith(_ANTHROPIC_PATH) else b""
            text = kind + b"data: " + text + b"\n\n"
        elif self._media == _LINES:
            text += b"\n"
        else:
            raise error
        self._over = True
        await self._send({"type": "http.response.body", "body": text})

    async def _send_first_event(self, start: Message, message: Message) -> None:
        self._start = None
        if not self._refused.status:
            self._over = not message.get("more_body")
            await self._send(start)
            await self._send(message)
            return
        response = error_response(
            self._refused.status, self._refused.message, retry_after=self._refused.retry_after
        )
        await self._send_response(response)

    async def _send_response(self, response: Response) -> None:
        self.status = response.status_code
        await self._send_error(bytes(response.body), MutableHeaders(raw=response.raw_headers))

    async def _send_error(self, body: bytes, headers: MutableHeaders) -> None:
        self._over = True
        body = _with_error(self.status, body, self._path)
        headers["content-length"] = str(len(body))
        headers["content-type"] = JSON.media_type
        await self._send(
            {"type": "http.response.start", "status": int(self.status), "headers": headers.raw}
        )
        await self._send({"type": "http.response.body", "body": body})


def _is_a_mistake(error: Exception) -> bool:
    """Whether ``error`` comes of what the client sent."""
    if isinstance(error, AttributeError):  # of a body or a value in it, of another type
        return error.obj is None or type(error.obj) in _VALUES
    return isinstance(error, _MISTAKES)


def _with_error(status: int, body: bytes, path: str) -> bytes:
    """The body of an error, with the object that clients of ``path`` look for."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        data = body.decode(errors="replace")
    if not isinstance(data, dict):
        data = {"message": data if isinstance(data, str) and data else _phrase(status)}
    if isinstance(data.get("message"), str):
        # FastAPI tells where in SGLang's source the route is; that is not for the client.
        data["message"] = data["message"].partition('\n\n  File "')[0]
    error = data.get("error", data.get("message"))
    _drop_other_status(data, status)
    if isinstance(error, dict):
        given = {key: value for key, value in error.items() if value is not None}
        _drop_other_status(given, status)
        error = {**_error(status, str(error.get("message", ""))), **given}
    else:
        error = _error(status, str(error or _phrase(status)), param=data.get("param"))
    if path.startswith(_ANTHROPIC_PATH):
        kind = _ANTHROPIC_TYPES.get(status, _type(status))
        data = {"type": "error", "error": {"type": kind, "message": error["message"]}}
    else:
        data["error"] = error
    return msgspec.json.encode(data)


def _drop_other_status(error: dict[str, Any], status: int) -> None:
    """Drops the ``code`` of an application whose own status does not leave the server. Where the
    code is a name, it stays."""
    if isinstance(error.get("code"), int) and error["code"] != status:
        del error["code"]


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase
