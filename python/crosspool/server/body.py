"""Bodies of requests: read in one place, within bounds, before any application sees them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Message, Receive

from crosspool.config.deployment import Deployment
from crosspool.server import json_shape
from crosspool.server.errors import RequestError
from crosspool.server.request_bounds import RequestBounds

_SMALL = 32 << 10
"""Bytes of a body that is looked at within the event loop: it takes less than a millisecond."""


class Body:
    """The body of one request."""

    def __init__(self, raw: bytes, content_type: str) -> None:
        self.raw = raw
        self._content_type = content_type
        self._decoded: Any = None

    @property
    def model(self) -> str | None:
        """The model that it names. Raises RequestError where that is no string."""
        name = self._decoded.get("model") if isinstance(self._decoded, dict) else None
        if name is not None and not isinstance(name, str):
            raise RequestError(HTTPStatus.BAD_REQUEST, "`model` must be a string", param="model")
        return name

    def decode(self, most_values: int, most_depth: int) -> None:
        """Raises RequestError for JSON that is too large or not valid, or that is no object. What
        is not said to be JSON may be anything."""
        if not self.raw.strip() or "multipart/form-data" in self._content_type:
            return
        if problem := json_shape.problem(self.raw, most_values, most_depth):
            raise RequestError(HTTPStatus.BAD_REQUEST, problem)
        try:
            self._decoded = msgspec.json.decode(self.raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if "json" not in self._content_type:
                return
            text = f"the body is not valid JSON: {error}"
            raise RequestError(HTTPStatus.BAD_REQUEST, text) from None
        if not isinstance(self._decoded, dict):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")

    def check(self, bounds: RequestBounds) -> None:
        """Raises RequestError for what asks for more than ``bounds``."""
        if self._decoded is not None:
            bounds.check(self._decoded)

    def replay(self, receive: Receive) -> Receive:
        """``receive`` for an application behind this one: this body, then what the client sends."""
        unread = [self.raw]

        async def replayed() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        return replayed


class Bodies:
    """Reads bodies within the bounds of ``deployment``."""

    def __init__(self, deployment: Deployment) -> None:
        self._most_bytes = deployment.max_body_bytes
        self._most_values = deployment.max_json_values
        self._most_depth = deployment.max_json_depth
        self._threads = ThreadPoolExecutor(1, "bodies")

    async def read(self, request: Request, longest_context: int) -> Body:
        """The whole body. ``longest_context`` is that of any model, in tokens. Raises RequestError
        for one that is too large or no valid JSON, before it is read where its header says so."""
        raw = await self._raw(request)
        body = Body(raw, request.headers.get("content-type", ""))
        most_values = self._most_values + longest_context
        await self._run(body, body.decode, most_values, self._most_depth)
        return body

    async def check(self, body: Body, bounds: RequestBounds) -> None:
        """Raises RequestError for what asks for more than ``bounds``."""
        await self._run(body, body.check, bounds)

    async def _run(self, body: Body, function: Any, *arguments: Any) -> None:
        """Looks at a large body in a thread of its own, where the event loop does not wait."""
        if len(body.raw) <= _SMALL:
            function(*arguments)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, function, *arguments)

    async def _raw(self, request: Request) -> bytes:
        announced = request.headers.get("content-length")
        if announced is None and "transfer-encoding" not in request.headers:
            return b""
        if announced is not None and int(announced) > self._most_bytes:
            raise self._too_large()
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._most_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is larger than {self._most_bytes} bytes (max_body_bytes)",
        )
