"""The scheduler's end of the admin socket."""

from __future__ import annotations

import logging

import msgspec
import zmq

from crosspool.transport import admin

log = logging.getLogger(__name__)


class AdminSocket:
    """Binds ``address``. Register :attr:`socket` with a poller and call :meth:`receive` when it is
    readable."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = admin.bind(context, address)

    def receive(self) -> tuple[bytes, admin.ToScheduler] | None:
        """The next message and its sender, or None when no message is left."""
        while True:
            try:
                sender, frame = self.socket.recv_multipart(zmq.NOBLOCK)
                return sender, admin.decode_to_scheduler(frame)
            except zmq.Again:
                return None
            except (ValueError, msgspec.DecodeError) as error:
                log.error("dropped an admin message that cannot be read: %s", error)

    def reply(self, sender: bytes, message: admin.FromScheduler) -> None:
        self.socket.send_multipart([sender, admin.encode(message)])
