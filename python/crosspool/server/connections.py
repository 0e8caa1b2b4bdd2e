"""Connections that take up a descriptor and never ask for anything are closed.

uvicorn bounds the time of an idle connection alone, not that of a header or a body that never
becomes whole, and the number of requests, but not that of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from http import HTTPStatus

import h11

from crosspool.config.deployment import Deployment
from crosspool.server.errors import error_response
from crosspool.server.lingering import LingeringProtocol

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


def protocol(deployment: Deployment) -> type[LingeringProtocol]:
    """uvicorn's protocol for HTTP/1.1, with ``deployment``'s bounds on connections and times."""
    most = most_connections(deployment)
    bounds = {"header": deployment.header_timeout, "body": deployment.body_timeout}

    class BoundedProtocol(LingeringProtocol):
        """Waits for a header from the moment on that its client connects or begins one, then for
        the body."""

        _timer: asyncio.TimerHandle | None = None
        _awaited: str | None = None
        """What its client has to send now: ``header``, ``body`` or nothing."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                self.transport.may_linger = False  # there are too many descriptors as it is
                self._refuse(503, f"the server has {most} connections (max_connections)")
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._watch()

        def handle_events(self) -> None:
            super().handle_events()
            self._watch()

        def shutdown(self) -> None:
            if self._awaited == "body" and not self.cycle.response_started:
                self.transport.may_linger = False  # there is no answer that could be lost
                self.transport.close()
            else:
                super().shutdown()

        def _watch(self) -> None:
            """Starts the time for what the client has to send, where that has changed."""
            state, awaited = self.conn.their_state, None
            if self not in self.connections or self.transport.is_closing():
                pass  # closed, or handed to another protocol
            elif state is h11.SEND_BODY:
                awaited = "body"
            elif state is h11.IDLE and (
                self.timeout_keep_alive_task is None or self.conn.trailing_data[0]
            ):
                awaited = "header"
            if awaited == self._awaited:
                return
            self._awaited = awaited
            if self._timer is not None:
                self._timer.cancel()
            if awaited is not None:
                self._timer = self.loop.call_later(bounds[awaited], self._give_up)

        def _give_up(self) -> None:
            what = self._awaited
            assert what is not None
            if what == "header" or not self.cycle.response_started:
                self._refuse(408, f"no whole {what} of a request came within {bounds[what]:g} s")
            self.transport.close()

        def _refuse(self, status: int, message: str) -> None:
            """Answers what was not asked yet, and closes the connection."""
            response = error_response(status, message, headers={"connection": "close"})
            phrase = HTTPStatus(status).phrase.encode()
            lines = [b"%s: %s" % header for header in response.raw_headers]
            head = [b"HTTP/1.1 %d %s" % (status, phrase), *lines, b"", bytes(response.body)]
            self.transport.write(b"\r\n".join(head))
            self.transport.close()

    return BoundedProtocol
