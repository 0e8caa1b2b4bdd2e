"""Sockets between hosts: TCP, encrypted and authenticated by CURVE, in both directions.

The end that listens shows that it has the server's secret key, or no handshake succeeds; the end
that connects must have a key that :class:`ClientCheck` knows. Until both have shown that, libzmq
hands nothing on, and gives the connection up after ``HANDSHAKE_SECONDS``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Any, Literal

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from crosspool.observability.bounded_log import BoundedLog
from crosspool.transport.deployment_keys import CurveKeys

log = logging.getLogger(__name__)
bounded = BoundedLog(log)
failures = BoundedLog(log)
"""Apart from the others, so that many handshakes that fail leave room for a key that is refused."""

HANDSHAKE_SECONDS = 5.0
_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"crosspool"
_BEATS = 4
"""Heartbeats of a connection within the time after which silence ends it."""


class ClientCheck:
    """Answers libzmq's question who may connect to the servers of ``context``: clients with a
    public key of ``allowed``. Register :attr:`socket` with a poller and call :meth:`answer` when it
    is readable; https://rfc.zeromq.org/spec/27 has the messages."""

    def __init__(self, context: zmq.Context[Any], allowed: Collection[str]) -> None:
        self._allowed = {z85.decode(key.encode()) for key in allowed}
        self.socket: zmq.Socket[Any] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP)

    def answer(self) -> None:
        """Answers every question that waits."""
        while self.socket.poll(0):
            _, number, _, address, _, mechanism, *credentials = self.socket.recv_multipart()
            allowed = mechanism == b"CURVE" and set(credentials) <= self._allowed and credentials
            if not allowed:
                bounded.error(
                    "refused a connection from %s: its key is not of this deployment",
                    address.decode(errors="replace"),
                )
            status = (b"200", b"OK") if allowed else (b"400", b"unknown key")
            self.socket.send_multipart([b"1.0", number, *status, b"", b""])


def _prepare(socket: zmq.Socket[Any], silence: float, max_bytes: int) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_SECONDS * 1000))
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(silence * 1000 / _BEATS))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(silence * 1000))


def bind_server(
    socket: zmq.Socket[Any], address: str, keys: CurveKeys, *, silence: float, max_bytes: int
) -> None:
    """Binds the socket, which takes CURVE alone. A :class:`ClientCheck` of its context
    must be there: without one, every connection is refused. Connections that are silent for
    ``silence`` seconds end, and so do those that send more than ``max_bytes`` at a time. Raises
    zmq.ZMQError when the address is taken or not this host's."""
    _prepare(socket, silence, max_bytes)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    socket.bind(address)


def prepare_client(
    socket: zmq.Socket[Any], server: str, keys: CurveKeys, *, silence: float, max_bytes: int
) -> None:
    """Has the socket, which is connected next, speak only with a server that has the secret key of
    the public key ``server``; see :func:`bind_server`."""
    _prepare(socket, silence, max_bytes)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.CURVE_SERVERKEY, server.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())


Happened = Literal["joined", "refused", "failed", "left"]
"""What happens to connections: the handshake succeeded; the other end refused our key; the
handshake failed, since the other end has another server key or does not speak CURVE; a connection
has ended."""

_EVENTS: dict[int, Happened] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "joined",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "refused",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "failed",
    zmq.EVENT_DISCONNECTED: "left",
}


class ConnectionMonitor:
    """Tells what happens to the connections of a socket; make it before the socket connects or is
    bound. :attr:`socket` is readable when there is something to tell."""

    def __init__(self, watched: zmq.Socket[Any]) -> None:
        self._watched = watched
        events = 0
        for event in _EVENTS:
            events |= event
        self.socket: zmq.Socket[Any] = watched.get_monitor_socket(events)

    def happened(self) -> Iterator[Happened]:
        """Yields what has happened since the last call."""
        while self.socket.poll(0):
            event = int(recv_monitor_message(self.socket)["event"])
            if event in _EVENTS:
                yield _EVENTS[event]

    def log_failures(self) -> None:
        """Logs, within bounds, that handshakes have failed since the last call."""
        for happened in self.happened():
            if happened == "failed":
                failures.error(
                    "a connection from another host was refused: its handshake failed, as when its "
                    "file of keys is of another deployment"
                )

    def close(self) -> None:
        self._watched.disable_monitor()
        self.socket.close(0)
