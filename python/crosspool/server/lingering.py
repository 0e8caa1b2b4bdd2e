"""How the HTTP server ends a connection: so that the client can read the answer.

An answer may be complete before the request is: an unknown path, a key that is wrong, a body that
is too long. If the server then closed the connection, the kernel would reset it over what it has
not read, and the answer would be lost on its way.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from crosspool.server.keys import ADMIN_SOCKET

LINGER_SECONDS = 2.0
"""How long a client may go on sending once the server has closed its side of the connection."""
LINGER_BYTES = 64 << 20
"""How much it may send then."""


class LingeringTransport:
    """A transport whose :meth:`close` closes its own side first, and the rest once the client has
    closed its side, has sent too much or has taken too long."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.may_linger = True
        self.is_lingering = False
        self._dropped = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.is_lingering or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if not self.may_linger or self.is_closing():
            return self._transport.close()
        self.is_lingering = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.abort)

    def drop(self, data: bytes) -> None:
        """Takes what the client sends after the end."""
        self._dropped += len(data)
        if self._dropped > LINGER_BYTES:
            self._transport.abort()


class LingeringProtocol(H11Protocol):
    """One connection of uvicorn's HTTP server."""

    transport: LingeringTransport  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(LingeringTransport(transport))  # type: ignore[arg-type]
        listener = transport.get_extra_info("socket")
        if listener is not None and listener.family == socket.AF_UNIX:
            self.app_state = {**self.app_state, ADMIN_SOCKET: True}

    def data_received(self, data: bytes) -> None:
        if self.transport.is_lingering:
            self.transport.drop(data)
        else:
            super().data_received(data)

    def shutdown(self) -> None:
        self.transport.may_linger = self.conn.their_state is not h11.IDLE
        super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.may_linger = self.conn.their_state is not h11.IDLE
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are no request, unless an answer is under way: then nothing is left
        but to close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
