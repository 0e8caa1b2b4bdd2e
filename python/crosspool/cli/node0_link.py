"""The connection of another host's launcher to that of node 0: a thread that keeps it, however long
the launcher itself is busy."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

import crosspool
from crosspool.config.errors import ConfigError
from crosspool.config.hosts import HostAddress
from crosspool.observability.bounded_log import BoundedLog
from crosspool.transport.curve import ConnectionMonitor, prepare_client
from crosspool.transport.deployment_keys import DeploymentKeys
from crosspool.transport.host_messages import (
    BEAT_SECONDS,
    MAX_MESSAGE_BYTES,
    VERSION,
    Alive,
    Begin,
    DeviceGone,
    End,
    Hello,
    HostFacts,
    HostLeaves,
    HostRefused,
    ToHost,
    ToNode0,
    Waiting,
    decode_to_host,
    encode,
)

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

_TICK_MS = 50
_LINGER_MS = 1000
_FAILED_HANDSHAKES = 3
"""Handshakes that fail one after another before node 0 counts as one that has other keys."""


class Node0Ended(Exception):
    """The server ends, and so do all its hosts."""


class HostNotTaken(ConfigError):
    """Node 0 does not take this host; the message says why."""


class Node0Link:
    """Connects to node 0 at ``address`` as host ``node`` of ``nnodes``. ``facts`` tells what this
    host has; ``silence`` and ``patience`` are seconds: node 0 is lost when it has been silent for
    the one, and given up when nothing has come for the other. ``say`` prints a line for the
    user."""

    def __init__(
        self,
        keys: DeploymentKeys,
        address: HostAddress,
        *,
        node: int,
        nnodes: int,
        facts: Callable[[], HostFacts],
        silence: float,
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self._keys = keys
        self._address = address
        self._node, self._nnodes = node, nnodes
        self._facts = facts
        self._silence, self._patience = silence, patience
        self._say = say
        self._name = secrets.token_hex(8)
        self._context: zmq.Context[Any] = zmq.Context()
        self._changed = threading.Condition()
        self._outgoing: list[ToNode0] = []
        self._begun: Begin | None = None
        """The latest session; None while node 0 is lost or has not begun one."""
        self._problem: str | None = None
        """Why node 0 does not take this host; None while it may."""
        self._message = ""
        self._has_ended = False
        self._closing = False
        self._silent_since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="node 0", daemon=True)
        self._thread.start()

    def look(self) -> Begin | None:
        """Returns the session whose devices are to run; None while node 0 is lost, or has begun
        none. Raises Node0Ended; HostNotTaken when node 0 refuses this host; ConfigError when nobody
        has answered for too long."""
        with self._changed:
            if self._has_ended:
                raise Node0Ended("node 0 has ended")
            if self._problem is not None:
                raise HostNotTaken(self._problem)
            if self._begun is None and time.monotonic() - self._silent_since >= self._patience:
                raise ConfigError(
                    f"dist_init_addr: nobody has answered at {self._where} for {self._patience:g} "
                    "s: is the launcher of node 0 there, and is its port open?"
                )
            return self._begun

    @property
    def message(self) -> str:
        """What is waited for; empty while nobody knows."""
        with self._changed:
            return self._message

    def wait(self) -> Begin:
        """Waits for a session, and returns it; raises as :meth:`look` does."""
        said = ""
        while (begin := self.look()) is None:
            if (message := self.message) and message != said:
                self._say(message)
                said = message
            with self._changed:
                self._changed.wait(BEAT_SECONDS)
        return begin

    def tell_of_end(self, session: int, device: str, incarnation: int, cause: str) -> None:
        """Tells that a device's process has ended, and that another one is started."""
        gone = DeviceGone(session=session, device=device, incarnation=incarnation, cause=cause)
        self._tell(gone)

    def close(self, cause: str, *, comes_back: bool) -> None:
        """Tells node 0 that this launcher ends, and ends the connection."""
        self._tell(HostLeaves(cause=cause, comes_back=comes_back))
        self._closing = True
        self._thread.join()

    def _tell(self, message: ToNode0) -> None:
        with self._changed:
            self._outgoing.append(message)

    @property
    def _where(self) -> str:
        return f"{self._address.host}:{self._address.port}"

    # --- the thread

    def _run(self) -> None:
        while not self._closing:
            self._connect_once()
        self._context.destroy(linger=_LINGER_MS)

    def _connect_once(self) -> None:
        """Speaks over one socket, until node 0 is lost: what is under way in a connection that has
        broken must not arrive."""
        socket: zmq.Socket[Any] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        prepare_client(
            *(socket, self._keys.server.public, self._keys.client),
            silence=self._silence,
            max_bytes=MAX_MESSAGE_BYTES,
        )
        monitor = ConnectionMonitor(socket)
        try:
            socket.connect(self._address.launchers)
            self._speak(socket, monitor)
        finally:
            monitor.close()
            socket.close()

    def _speak(self, socket: zmq.Socket[Any], monitor: ConnectionMonitor) -> None:
        poller = zmq.Poller()
        for one in (socket, monitor.socket):
            poller.register(one, zmq.POLLIN)
        joined, failures = False, 0
        heard = next_beat = time.monotonic()
        while True:
            poller.poll(_TICK_MS)
            for happened in monitor.happened():
                if happened == "joined":
                    joined, failures = True, 0
                    heard = next_beat = time.monotonic()
                    socket.send(encode(self._hello()))
                elif happened == "refused":
                    self._refuse(
                        f"node 0 at {self._where} does not know the key of this host: give both "
                        "the same file with --keys"
                    )
                elif happened == "failed":
                    failures += 1
                elif joined:
                    self._take_all(socket)  # node 0 may have said why
                    return self._lose("the connection to node 0 has broken")
            if failures >= _FAILED_HANDSHAKES:
                self._refuse(
                    f"who answers at {self._where} has not the keys of this deployment: give "
                    "both hosts the same file with --keys, and look whether the address is node 0's"
                )
                failures = 0
            if self._take_all(socket):
                heard = time.monotonic()
            now = time.monotonic()
            if joined and now - heard >= self._silence:
                return self._lose(f"node 0 has been silent for {self._silence:g} s")
            for message in self._drain(joined):
                socket.send(encode(message))
            if joined and now >= next_beat:
                socket.send(encode(self._hello() if self._begun is None else Alive()))
                next_beat = now + BEAT_SECONDS
            if self._closing:
                return None

    def _drain(self, joined: bool) -> list[ToNode0]:
        with self._changed:
            if not joined:
                return []
            messages, self._outgoing = self._outgoing, []
            return messages

    def _hello(self) -> Hello:
        return Hello(
            version=VERSION,
            crosspool=crosspool.__version__,
            deployment=self._keys.deployment,
            node=self._node,
            nnodes=self._nnodes,
            launcher=self._name,
            facts=self._facts(),
        )

    def _refuse(self, problem: str) -> None:
        with self._changed:
            self._problem = problem
            self._changed.notify_all()

    def _lose(self, cause: str) -> None:
        with self._changed:
            if self._begun is not None or self._message:
                self._message = f"{cause}; waiting for it"
            self._begun = None
            self._outgoing = []
            self._changed.notify_all()

    def _take_all(self, socket: zmq.Socket[Any]) -> bool:
        """Takes all messages that have come; returns whether there were any."""
        found = False
        while socket.poll(0):
            self._take(socket.recv_multipart())
            found = True
        return found

    def _take(self, frames: list[bytes]) -> None:
        try:
            (frame,) = frames
            message: ToHost = decode_to_host(frame)
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            bounded.error("dropped what is no message of node 0: %s", error)
            return
        with self._changed:
            self._silent_since = time.monotonic()
            match message:
                case Waiting():
                    self._message, self._begun = message.message, None
                case Begin():
                    self._begun = message
                case HostRefused():
                    self._problem = message.reason
                case End():
                    self._has_ended, self._begun = True, None
            self._changed.notify_all()
