"""What the launcher tells the HTTP process of the others: it is their parent and knows first.

The HTTP process binds one PULL at ``deployment.notice_address``. Frames are msgpack, typed by
msgspec.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

MAX_MESSAGE_BYTES = 64 << 10
"""Who tells more is cut off."""


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """A process has ended; the launcher stops the others soon. ``cause`` names the process."""

    cause: str


class SchedulerGone(msgspec.Struct, frozen=True, kw_only=True, tag="scheduler_gone"):
    """The scheduler has ended; another one takes its place."""


class Stopped(msgspec.Struct, frozen=True, kw_only=True, tag="stopped"):
    """A signal has stopped a process, which may continue."""

    process: str


class Continued(msgspec.Struct, frozen=True, kw_only=True, tag="continued"):
    """A process that was stopped continues."""

    process: str


Notice = Lost | SchedulerGone | Stopped | Continued

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Notice)


def decode(frame: bytes) -> Notice:
    """Raises msgspec.DecodeError or, where it is nested too deep, RecursionError for anything that
    is no notice."""
    return _decoder.decode(frame)


def bind(context: zmq.asyncio.Context, address: str) -> zmq.asyncio.Socket:
    """Binds the HTTP process's socket, to which only this user can connect."""
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.bind(address)
    os.chmod(Path(address.removeprefix("ipc://")), 0o600)
    return socket


class Teller:
    """The launcher's end. It never waits: what is told before the HTTP process listens arrives when
    it does."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[Any] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def tell(self, notice: Notice) -> None:
        with contextlib.suppress(zmq.Again):  # the HTTP process has long ceased to read
            self._socket.send(_encoder.encode(notice), zmq.NOBLOCK)
