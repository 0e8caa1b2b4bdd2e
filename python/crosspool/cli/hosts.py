"""The other hosts of a deployment, seen from the launcher of node 0: a thread speaks with their
launchers, however long the launcher itself is busy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from crosspool.cli.host_table import HostEvent, HostJoined, HostLost, HostTable, without_own
from crosspool.config.deployment import Deployment, load
from crosspool.config.errors import ConfigError
from crosspool.config.hosts import HostAddress
from crosspool.config.ports import probe
from crosspool.observability.bounded_log import BoundedLog
from crosspool.transport.control_keys import SchedulerKeys, save_data_key, save_keys
from crosspool.transport.curve import ClientCheck, ConnectionMonitor, bind_server
from crosspool.transport.deployment_keys import CurveKeys, DeploymentKeys
from crosspool.transport.host_messages import (
    BEAT_SECONDS,
    MAX_MESSAGE_BYTES,
    HostFacts,
    decode_to_node0,
    encode,
)

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

_TICK_MS = 50
_LINGER_MS = 1000
"""Time that a last message has to leave."""


class HostsMissing(RuntimeError):
    """Not all hosts have come in time; the message is meant for the user."""


class Hosts:
    """Listens at ``address`` for the launchers of ``nnodes - 1`` other hosts. ``silence`` and
    ``patience`` are seconds, as for :class:`~crosspool.cli.host_table.HostTable`; ``say`` prints a
    line for the user.

    Raises ConfigError when the address is taken or not this host's."""

    def __init__(
        self,
        keys: DeploymentKeys,
        address: HostAddress,
        nnodes: int,
        *,
        silence: float,
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self._keys = keys
        self._patience = patience
        self._say = say
        self._table = HostTable(
            keys.deployment, nnodes, silence=silence, patience=patience, clock=time.monotonic
        )
        self._changed = threading.Condition()
        """Held by whoever uses the table; told when something has come."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._check = ClientCheck(self._context, [keys.client.public])
        self._socket: zmq.Socket[Any] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._monitor = ConnectionMonitor(self._socket)
        port = address.port + 1
        try:
            probe(address.numeric.host, port)  # the scheduler binds it later
            port = address.port
            bind_server(
                *(self._socket, address.numeric.launchers, keys.server),
                silence=silence,
                max_bytes=MAX_MESSAGE_BYTES,
            )
        except (OSError, zmq.ZMQError, ConfigError) as error:
            self._monitor.close()
            self._context.destroy(linger=0)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"dist_init_addr: cannot listen on {address.host}:{port}: {error.strerror}"
            ) from None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)
        self._thread.start()

    def wait_for_all(self) -> dict[int, HostFacts]:
        """Returns what each other host has, by its number, once all are there. Raises HostsMissing
        when that takes too long, or when one leaves that will not come back."""
        said: list[int] = []
        while True:
            with self._changed:
                missing = self._table.missing
                if not missing:
                    return self._table.facts
                self._changed.wait(BEAT_SECONDS)
                events = self._table.drain_events()
            if missing != said:
                self._say(f"waiting for {', '.join(f'node {node}' for node in missing)}")
                said = missing
            for event in events:
                self._say_what_happened(event)
                if isinstance(event, HostLost) and event.is_final:
                    raise HostsMissing(event.cause)

    def begin(self, deployment: Deployment) -> None:
        """Makes keys for a scheduler that is started next, and has every host run its devices for
        it: processes that an earlier scheduler had cannot connect to this one. ``deployment`` lies
        in its runtime folder."""
        own = CurveKeys.new()
        scheduler = SchedulerKeys(own=own, devices=self._keys.client.public)
        save_keys(deployment.control_keys, scheduler)
        save_data_key(deployment.data_key, self._keys)
        with self._changed:
            # Models come and go while the server runs.
            self._table.begin(lambda: without_own(load(deployment.file)), own.public)

    def take_events(self) -> list[HostEvent]:
        """What has happened since the last call; tells the user of hosts."""
        with self._changed:
            events = self._table.drain_events()
        for event in events:
            self._say_what_happened(event)
        return events

    def _say_what_happened(self, event: HostEvent) -> None:
        if isinstance(event, HostJoined):
            self._say(f"node {event.node} is {'back' if event.is_back else 'there'}")
        elif isinstance(event, HostLost):
            ends = "" if event.is_final else "; its devices are lost until it is back"
            self._say(f"{event.cause}{ends}")

    def close(self) -> None:
        """Has all launchers end, and stops listening."""
        with self._changed:
            self._table.end()
            self._closing = True
        self._thread.join()

    # --- the thread

    def _run(self) -> None:
        poller = zmq.Poller()
        for one in (self._socket, self._check.socket, self._monitor.socket):
            poller.register(one, zmq.POLLIN)
        next_beat = 0.0
        while True:
            poller.poll(_TICK_MS)
            self._check.answer()
            self._monitor.log_failures()
            with self._table_changes():
                self._receive()
                self._table.look()
                if (now := time.monotonic()) >= next_beat:
                    self._table.beat()
                    next_beat = now + BEAT_SECONDS
                closing = self._closing
                messages = self._table.drain_messages()
            for sender, message in messages:
                self._socket.send_multipart([sender, encode(message)], zmq.NOBLOCK)
            if closing:
                self._monitor.close()
                self._context.destroy(linger=_LINGER_MS)
                return

    @contextmanager
    def _table_changes(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def _receive(self) -> None:
        while self._socket.poll(0):
            sender, *frames = self._socket.recv_multipart()
            try:
                (frame,) = frames
                self._table.receive(sender, decode_to_node0(frame))
            except (ValueError, msgspec.DecodeError, RecursionError) as error:
                bounded.error("dropped what is no message of another host: %s", error)
