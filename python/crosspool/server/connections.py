"""Connections that take up a descriptor and never ask for anything are closed.

uvicorn bounds the time of an idle connection alone, not that of a header or a body that never
becomes whole, and the number of requests, but not that of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from crosspool.config.deployment import Deployment
from crosspool.server.errors import error_response

_OTHER_DESCRIPTORS = 256
"""Descriptors left for everything that is no client's connection."""


def most_connections(deployment: Deployment) -> int:
    """How many clients may be connected at once: what the deployment allows, if the limit of open
    files does. Raises that limit as far as it needs and may."""
    wanted = deployment.max_connections + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < wanted:
        soft = wanted if hard == unlimited else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == unlimited or soft >= wanted:
        return deployment.max_connections
    return max(soft - _OTHER_DESCRIPTORS, soft // 2)


def protocol(deployment: Deployment) -> type[HttpToolsProtocol]:
    """uvicorn's protocol for HTTP/1.1, with ``deployment``'s bounds on connections and times."""
    most = most_connections(deployment)

    class BoundedProtocol(HttpToolsProtocol):
        """Waits for the header of a request from the moment on that its client connects or sends
        its first byte, then for its body."""

        _timer: asyncio.TimerHandle | None = None
        _begun = False
        """Whether a request has begun that is not whole."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                self._refuse(503, f"the server has {most} connections (max_connections)")
            else:
                self._wait(deployment.header_timeout, "header")

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self.transport.is_closing():
                super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begun = True
            self._wait(deployment.header_timeout, "header")

        def on_headers_complete(self) -> None:
            self._wait(deployment.body_timeout, "body")
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._begun = False
            self._stop_waiting()
            super().on_message_complete()

        def shutdown(self) -> None:
            if self._begun and not self._is_answering():
                self.transport.close()
            super().shutdown()

        def _is_answering(self) -> bool:
            """Whether the client waits for a request before the one that it sends."""
            whole = self.cycle is not None and not self.cycle.more_body
            return bool(self.pipeline) or (whole and not self.cycle.response_complete)

        def _wait(self, seconds: float, what: str) -> None:
            self._stop_waiting()
            self._timer = self.loop.call_later(seconds, self._give_up, seconds, what)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self, seconds: float, what: str) -> None:
            if self._is_answering():  # nothing is read meanwhile
                self._wait(seconds, what)
            elif self._begun and (what == "header" or not self.cycle.response_complete):
                self._refuse(408, f"the {what} of the request was not whole after {seconds:g} s")
            else:
                self.transport.close()

        def _refuse(self, status: int, message: str) -> None:
            """Answers, where no answer has begun, and closes the connection."""
            cycle: Any = self.cycle
            if cycle is None or cycle.response_complete or not cycle.response_started:
                response = error_response(status, message, headers={"connection": "close"})
                lines = [b"%s: %s" % header for header in response.raw_headers]
                head = b"\r\n".join([b"HTTP/1.1 %d " % status, *lines, b"", b""])
                self.transport.write(head + bytes(response.body))
            self.transport.close()

    return BoundedProtocol
