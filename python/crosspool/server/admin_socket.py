"""The scheduler's end of the admin socket."""

from __future__ import annotations

import logging

import msgspec
import zmq

from crosspool.observability.bounded_log import BoundedLog
from crosspool.transport import admin
from crosspool.transport.detokenizer_link import ToDetokenizer

log = BoundedLog(logging.getLogger(__name__))


class AdminSocket:
    """Binds ``address``. Register :attr:`socket` with a poller and call :meth:`receive` when it is
    readable."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = admin.bind(context, address)

    def receive(self) -> tuple[bytes, admin.ToScheduler] | None:
        """The next message and its sender, or None when no message is left."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) != 2:
                log.error("dropped an admin message of %d parts", len(frames) - 1)
                continue
            try:
                return frames[0], admin.decode_to_scheduler(frames[1])
            except (msgspec.DecodeError, RecursionError) as error:
                log.error("dropped an admin message that cannot be read: %s", error)

    def reply(self, sender: bytes, message: admin.FromScheduler | ToDetokenizer) -> None:
        """Sends ``message``, which is lost if its receiver is gone or does not read."""
        try:
            self.socket.send_multipart([sender, admin.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.error("an admin message cannot be answered: %s", error)
