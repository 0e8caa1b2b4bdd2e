"""Answers that tell, as server-sent events, how far something is that takes a while."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from crosspool.server.errors import RequestError, error_response

Steps = AsyncIterator[dict[str, Any]]
"""What there is to tell, one after another; the last is how it has ended. Raises RequestError."""


def wants_events(request: Request) -> bool:
    """Whether the request says ``?stream=1``."""
    return request.query_params.get("stream", "").lower() in ("1", "true")


def events(steps: Steps) -> Response:
    """Tells every step that differs from the one before it as an event."""
    return StreamingResponse(_events(steps), media_type="text/event-stream")


async def _events(steps: Steps) -> AsyncIterator[bytes]:
    last = None
    try:
        async for told in steps:
            if told != last:
                last = told
                yield _event(msgspec.json.encode(told))
    except RequestError as error:
        yield _event(bytes(error_response(error.status_code, error.detail).body))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
