"""The typed face of connections to other hosts (``sgl-kernel-ext/cpu/links/``): each carries what
one end of a link publishes into the memory of the other. The headers say how."""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from ctypes import POINTER, byref, c_int32, c_int64, c_uint32, c_uint64, c_void_p

from crosspool.kernels import native
from crosspool.kernels.native import Signatures

ATTENTION, FFN = 0, 1
"""Values of ``crosspool::LinkEnd``."""


class LossReason(enum.IntEnum):
    """Why a connection has ended: ``crosspool::LossReason``."""

    NONE = 0
    CLOSED = 1
    SYSTEM = 2
    MALFORMED = 3
    UNASKED = 4
    NUMBER = 5
    ROWS = 6


_SAID = {
    LossReason.NONE: "it has not ended",
    LossReason.CLOSED: "the other end closed it, or has died",
    LossReason.MALFORMED: "a message was malformed",
    LossReason.UNASKED: "a message came that was not due",
    LossReason.NUMBER: "a message had a number or an epoch that does not fit this end's",
    LossReason.ROWS: "a message had rows without room for them, or other ones than its dispatch",
}


class ConnectionStatus(ctypes.Structure):
    """What a connection is and was: ``crosspool::ConnectionStatus``."""

    _fields_ = (
        ("losses", c_uint64),
        ("open", c_int32),
        ("reason", c_int32),
        ("error", c_int32),
        ("reserved", c_int32),
    )

    @property
    def description(self) -> str:
        """Why the last connection ended."""
        reason = LossReason(self.reason)
        return os.strerror(self.error) if reason == LossReason.SYSTEM else _SAID[reason]


SIGNATURES: Signatures = {
    "crosspool_network_create": (c_int32, (c_void_p, POINTER(c_void_p))),
    "crosspool_network_free": (None, (c_void_p,)),
    "crosspool_network_add": (
        c_void_p,
        (c_void_p, c_void_p, c_uint64, c_uint32, c_uint32, c_int32),
    ),
    "crosspool_network_hand_over": (None, (c_void_p, c_void_p, c_int32)),
    "crosspool_network_losses": (c_int32, (c_void_p,)),
    "crosspool_network_wait": (c_int32, (c_void_p, POINTER(c_uint32), c_int64, c_int64)),
    "crosspool_connection_publish": (None, (c_void_p,)),
    "crosspool_connection_progress": (c_int32, (c_void_p,)),
    "crosspool_connection_status": (None, (c_void_p, POINTER(ConnectionStatus))),
}
"""Functions that the library exports for connections."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library()
    native.declare(library, SIGNATURES)
    return library


class Connection:
    """One link's connection, which comes and goes. It lives as long as its :class:`Network`."""

    def __init__(self, network: int, address: int) -> None:
        self._native = _library()
        self._network = network
        self.address = address

    def hand_over(self, socket: int) -> None:
        """Takes a connected, non-blocking socket, by its descriptor, which is closed in the end.
        The loop's next look has it in the place of the one before."""
        self._native.crosspool_network_hand_over(self._network, self.address, socket)

    def progress(self) -> bool:
        """Sends what this end has published and takes what has come, for the loop's thread; returns
        whether the peer has published."""
        return bool(self._native.crosspool_connection_progress(self.address))

    def ring(self) -> None:
        """Sends what this end has published, as far as the system takes it."""
        self._native.crosspool_connection_publish(self.address)

    def status(self) -> ConnectionStatus:
        found = ConnectionStatus()
        self._native.crosspool_connection_status(self.address, byref(found))
        return found


class Network:
    """The connections of a device, and how its loop waits for them and for its doorbell."""

    def __init__(self, doorbell: int) -> None:
        """``doorbell``: address of the device's doorbell, which stays there. Raises OSError."""
        self._native = _library()
        found = c_void_p()
        status = self._native.crosspool_network_create(doorbell, byref(found))
        if status < 0:
            raise OSError(-status, f"connections to other hosts: {os.strerror(-status)}")
        self.address = found.value or 0
        self._seen = c_uint32(0)

    def add(
        self, link: int, payload_bytes: int, *, max_rows: int, max_row_bytes: int, end: int
    ) -> Connection:
        """Returns the connection of a link whose memory, all zero, is at ``link``; ``end`` is
        ATTENTION or FFN. No loop may use the network yet."""
        address = self._native.crosspool_network_add(
            self.address, link, payload_bytes, max_rows, max_row_bytes, end
        )
        return Connection(self.address, address)

    @property
    def losses_descriptor(self) -> int:
        """Readable (an eventfd) when a connection has ended."""
        return int(self._native.crosspool_network_losses(self.address))

    def wait(self, spin_ns: int, timeout_ns: int) -> bool:
        """Waits until the doorbell has rung since the last call, or a message has come; spins for
        at most ``spin_ns``, for ``timeout_ns`` in all. Returns whether there may be news."""
        return bool(
            self._native.crosspool_network_wait(
                self.address, byref(self._seen), spin_ns, timeout_ns
            )
        )

    def close(self) -> None:
        """Ends all connections. No loop may use them any more."""
        if self.address:
            self._native.crosspool_network_free(self.address)
            self.address = 0
