"""Bodies of requests: read in one place, within bounds, before any application sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from crosspool.config.deployment import Deployment
from crosspool.frontend.turns import Turns
from crosspool.server import json_shape
from crosspool.server.errors import RequestError
from crosspool.server.request_bounds import RequestBounds

_Kind = TypeVar("_Kind")
_SMALL = 32 << 10
"""Bytes of a body that is looked at within the event loop: it takes less than a millisecond. Such
bodies are not counted either, since the number of connections bounds them all."""


def decoded(raw: bytes, kind: type[_Kind]) -> _Kind:
    """A body of one of CrossPool's own routes, which may be empty. Raises RequestError."""
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(400, f"the body is not as it should be: {error}") from None


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

    def decode(self, most_values: int, most_depth: int, most_costly: int) -> None:
        """Raises RequestError for JSON that is too large or not valid, or that is no object. What
        is not said to be JSON may be anything."""
        if not self.raw.strip() or "multipart/form-data" in self._content_type:
            return
        if problem := json_shape.problem(self.raw, most_values, most_depth, most_costly):
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
        decoded, self._decoded = self._decoded, None  # which takes far more memory than the bytes
        if decoded is not None:
            bounds.check(decoded)

    def replay(self, receive: Receive) -> Receive:
        """``receive`` for an application behind this one: this body, then what the client sends."""
        unread = [self.raw]

        async def replayed() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        return replayed


class _Room:
    """The room for all bodies that are held at once, in bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    def check(self, more: int) -> None:
        """Raises RequestError where ``more`` bytes do not fit beside those that are held."""
        if self._held + more > self._most:
            raise RequestError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the bodies of all requests together have more than {self._most} bytes "
                "(max_total_body_bytes); try again later",
            )

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """What one body takes of it, until the end of the ``with``. Yields a function that takes
        the size of what has been read so far, and raises RequestError where it does not fit."""
        taken = 0

        def grow(size: int) -> None:
            nonlocal taken
            if size > _SMALL:
                self.check(size - taken)
                self._held += size - taken
                taken = size

        try:
            yield grow
        finally:
            self._held -= taken


class Bodies:
    """Reads bodies within the bounds of ``deployment``. Each is looked at in one of ``turns``."""

    def __init__(self, deployment: Deployment, turns: Turns) -> None:
        self._turns = turns
        self._most_bytes = deployment.max_body_bytes
        self._room = _Room(deployment.max_total_body_bytes)
        self._most_values = deployment.max_json_values
        self._most_depth = deployment.max_json_depth
        self._threads = ThreadPoolExecutor(1, "bodies")

    @asynccontextmanager
    async def read(self, request: Request, longest_context: int) -> AsyncIterator[Body]:
        """The whole body, which counts as held until the end of the ``with``. ``longest_context``
        is that of any model, in tokens. Raises RequestError for one that is too large or no valid
        JSON, or that does not fit beside those that are held; before it is read where its header
        says so. Raises ClientDisconnect where the client has not waited for its turn."""
        with self._room.share() as grow:
            raw = await self._raw(request, grow)
            if await self._turns.take() and await request.is_disconnected():
                raise ClientDisconnect
            body = Body(raw, request.headers.get("content-type", ""))
            most_values = self._most_values + longest_context
            costly = self._most_values // 4
            await self._run(body, body.decode, most_values, self._most_depth, costly)
            yield body

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

    async def _raw(self, request: Request, grow: Callable[[int], None]) -> bytes:
        announced = request.headers.get("content-length")
        if announced is None and "transfer-encoding" not in request.headers:
            return b""
        if announced is not None:
            self._check_size(int(announced))
            if int(announced) > _SMALL:
                self._room.check(int(announced))
        body = bytearray()
        async for part in request.stream():
            self._check_size(len(body) + len(part))
            grow(len(body) + len(part))
            body += part
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self._most_bytes:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body is larger than {self._most_bytes} bytes (max_body_bytes)",
            )
