"""Makes the connections of one device's links to devices of other hosts, and makes them again.

An FFN rank's device listens; an attention rank's device connects, once for each of its links. A
thread of the device process does both, so that a loop gets nothing but sockets whose other end has
proven itself (:mod:`crosspool.transport.handshake`). A link whose connection is lost waits for the
next, which is tried until it is there, as a link in shared memory waits for its peer's next
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from crosspool.kernels.network import Connection, Network
from crosspool.transport.handshake import (
    Credentials,
    Greeted,
    HandshakeError,
    LinkName,
    accept,
    connect,
)

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""Time for a connection and its handshake."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
"""Seconds before a connection is tried again."""
_SILENCE_MS = 3000
"""Time after which a peer that acknowledges nothing counts as lost."""
_MOST_HANDSHAKES = 64
"""Handshakes at a time that others have begun; further ones wait in the system's queue."""
_MOST_REMEMBERED = 256
"""Refusals that are remembered, so that each is logged once."""
_BUSY_POLL_US = 50
_SO_BUSY_POLL = 46

Address = tuple[str, int]


@dataclass(frozen=True)
class Peers:
    """How a device finds the devices of other hosts, and shows that it belongs to them."""

    credentials: Credentials
    listener: socket.socket | None = None
    """Listens for attention ranks' devices; a device with an FFN rank needs it. The launcher keeps
    it, so that a port stays as processes come and go."""
    addresses: Mapping[str, Address] = field(default_factory=dict)
    """Where the devices of other hosts listen, by name; it is looked at before each attempt, so
    that a device may move."""


class Connector:
    """The thread. ``outgoing`` are the links whose attention rank is here, each with the name of
    its FFN rank's device, and ``incoming`` those whose FFN rank is here."""

    def __init__(
        self,
        network: Network,
        peers: Peers,
        outgoing: Mapping[LinkName, tuple[Connection, str]],
        incoming: Mapping[LinkName, Connection],
    ) -> None:
        self._network, self._peers = network, peers
        self._outgoing, self._incoming = outgoing, incoming
        self._latest: dict[LinkName, int] = {}
        self._refused: set[tuple[str, str]] = set()
        self._lost = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="crosspool links", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. Connections that were handed over stay."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._work())

    async def _work(self) -> None:
        loop, losses = self._loop, self._network.losses_descriptor
        loop.add_reader(losses, self._on_loss, losses)
        for link, (connection, device) in self._outgoing.items():
            self._start(self._keep_connected(link, connection, device))
        for link, connection in self._incoming.items():
            self._start(self._tell_losses(link, connection))
        if self._peers.listener is not None:
            self._start(self._listen(self._peers.listener))
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loop.remove_reader(losses)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the links to other hosts has failed", exc_info=error)

    def _on_loss(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(descriptor)
        self._lost.set()
        self._lost = asyncio.Event()

    async def _next_loss(self, connection: Connection, before: int) -> int:
        """Waits until more connections of a link than ``before`` have ended; returns how many."""
        while True:
            lost = self._lost
            if (losses := int(connection.status().losses)) > before:
                return losses
            await lost.wait()

    async def _tell_losses(self, link: LinkName, connection: Connection) -> None:
        losses = 0
        while True:
            losses = await self._next_loss(connection, losses)
            log.warning("%s: the connection is lost: %s", link, connection.status().description)

    async def _keep_connected(self, link: LinkName, connection: Connection, device: str) -> None:
        losses, pause = 0, _FIRST_PAUSE
        while True:
            address = self._peers.addresses[device]
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self._connect(link, connection, address)
            except (OSError, HandshakeError, TimeoutError) as error:
                self._refuse(f"{device} at {address[0]}:{address[1]}", error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            log.info("%s: connected to %s", link, device)
            self._refused.clear()
            began = self._loop.time()
            losses = await self._next_loss(connection, losses)
            log.warning("%s: the connection is lost: %s", link, connection.status().description)
            if self._loop.time() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE  # it was no connection that ends at once each time
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _connect(self, link: LinkName, connection: Connection, address: Address) -> None:
        host, port = address
        infos = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = infos[0]
        with socket.socket(family, kind, protocol) as peer:
            _prepare(peer)
            await self._loop.sock_connect(peer, where)
            latest = self._latest.get(link, 0)
            greeted = await connect(peer, self._peers.credentials, link, latest=latest)
            self._hand_over(greeted, connection, peer)

    async def _listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        room = asyncio.Semaphore(_MOST_HANDSHAKES)
        while True:
            await room.acquire()
            try:
                peer, address = await self._loop.sock_accept(listener)
            except OSError as error:  # the peer has gone already, or there is no descriptor left
                room.release()
                self._refuse("the listening port", error)
                await asyncio.sleep(_FIRST_PAUSE)
                continue
            self._start(self._accept(peer, str(address[0]), room))

    async def _accept(self, peer: socket.socket, host: str, room: asyncio.Semaphore) -> None:
        try:
            with peer:
                _prepare(peer)
                async with asyncio.timeout(CONNECT_SECONDS):
                    greeted = await accept(peer, self._peers.credentials, self._latest_of)
                # Another process of the rank may have come meanwhile.
                if greeted.incarnation >= (self._latest_of(greeted.link) or 0):
                    self._hand_over(greeted, self._incoming[greeted.link], peer)
                    log.info("%s: %s has connected", greeted.link, host)
        except (OSError, HandshakeError, TimeoutError) as error:
            self._refuse(host, error)
        finally:
            room.release()

    def _latest_of(self, link: LinkName) -> int | None:
        return self._latest.get(link, 0) if link in self._incoming else None

    def _hand_over(self, greeted: Greeted, connection: Connection, peer: socket.socket) -> None:
        self._latest[greeted.link] = greeted.incarnation
        connection.hand_over(peer.detach())

    def _refuse(self, peer: str, error: Exception) -> None:
        """Logs why there is no connection, once for each peer and reason."""
        timed_out = isinstance(error, TimeoutError)
        reason = f"no reply within {CONNECT_SECONDS:.0f} s" if timed_out else str(error)
        if (peer, reason) in self._refused:
            return
        if len(self._refused) >= _MOST_REMEMBERED:
            self._refused.clear()
        self._refused.add((peer, reason))
        log.warning("no connection with %s: %s", peer, reason)


def _prepare(peer: socket.socket) -> None:
    """Sets what a link's connection needs: messages leave at once, and a peer that is silently gone
    is noticed."""
    peer.setblocking(False)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    with contextlib.suppress(PermissionError):  # more than the system's default needs a privilege
        peer.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL, _BUSY_POLL_US)
