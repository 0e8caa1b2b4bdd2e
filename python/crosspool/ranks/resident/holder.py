"""How a device process tells the process that holds its weights that a model sleeps, so that this
one gives the memory up, too."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

_MODEL_BYTES = 4
_REPLY_SECONDS = 30.0


class HolderLink:
    """A socket between the holder and the device processes that it forks, one after another."""

    def __init__(self) -> None:
        self._holder, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._holder.setblocking(False)
        self._device.settimeout(_REPLY_SECONDS)
        self._turn = threading.Lock()
        """Held by the thread that waits for its reply: another one would take it."""

    def give_up(self, model: int) -> None:
        """The device's end: returns when the holder has given a model's weights up. Where it does
        not within seconds, a warning says so. Threads may call it at once."""
        mine = model.to_bytes(_MODEL_BYTES, "little")
        with self._turn:
            try:
                self._device.send(mine)
                while self._device.recv(_MODEL_BYTES) != mine:
                    pass  # the reply to a device process that has died
            except OSError as error:
                log.warning("the holder still has the weights of model %d: %s", model, error)

    def fileno(self) -> int:
        """The holder's end, which is readable when there is a message."""
        return self._holder.fileno()

    def serve(self, drop: Callable[[int], None]) -> None:
        """The holder's end: drops what device processes have given up."""
        while True:
            try:
                message = self._holder.recv(_MODEL_BYTES)
            except BlockingIOError:
                return
            drop(int.from_bytes(message, "little"))
            self._holder.send(message)
