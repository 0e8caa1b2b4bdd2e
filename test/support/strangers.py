"""Connections that a deployment over two hosts has to refuse, as a program: it runs where a
stranger would, and reads the deployment's files only to make what a stranger might have recorded.

``python -m support.strangers KIND COUNT SEED PORT KEYS`` makes COUNT connections to the ports of
KIND (see ``KINDS``) of the deployment whose front end is at PORT, and whose keys are in KEYS.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq
from crosspool.config.deployment import Deployment
from crosspool.config.runtime_dir import find_running
from crosspool.transport.control_keys import load_scheduler_keys
from crosspool.transport.curve import ClientCheck, bind_server, prepare_client
from crosspool.transport.deployment_keys import CurveKeys, read_deployment_keys
from crosspool.transport.handshake import (
    Credentials,
    HandshakeError,
    LinkName,
    Verdict,
    accept,
    connect,
)

Address = tuple[str, int]
Stranger = Callable[[], None]
"""Makes one connection."""

HELLO = b"\x04\xc8\x05HELLO\x01\x00"
"""A command frame of 200 bytes, the beginning of CURVE's first
(https://rfc.zeromq.org/spec/26)."""
LONG_FRAME = b"\x06" + struct.pack(">Q", 1 << 62)
"""The header of a command that says that it is longer than any memory."""
BATCH = 50
SECONDS = 10.0


def greeting(mechanism: bytes) -> bytes:
    """How a client of ZMTP 3.1 begins, in 64 bytes (https://rfc.zeromq.org/spec/37)."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def say(address: Address, *parts: bytes, hear: bool = False) -> None:
    """Connects, sends the parts, and leaves; ``hear`` waits for something before each but the
    first."""
    with contextlib.suppress(OSError), socket.create_connection(address, SECONDS) as one:
        for number, part in enumerate(parts):
            if hear and number and not one.recv(4096):
                return
            one.sendall(part)


class Tap:
    """Passes one connection on to ``target``, and keeps what its client says."""

    def __init__(self, target: Address) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()
        self.said = b""
        self._target = target
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(self._target)

        def back() -> None:
            with contextlib.suppress(OSError):
                while part := server.recv(1 << 16):
                    client.sendall(part)
                client.shutdown(socket.SHUT_WR)

        threading.Thread(target=back, daemon=True).start()
        with contextlib.suppress(OSError):
            while part := client.recv(1 << 16):
                self.said += part
                server.sendall(part)

    def close(self) -> bytes:
        self._thread.join(SECONDS)
        self._listener.close()
        return self.said


def recorded_curve(server: CurveKeys, client: CurveKeys) -> bytes:
    """What a client with the right keys says to a server with the right keys, message and all."""
    context: zmq.Context[Any] = zmq.Context()
    check = ClientCheck(context, [client.public])
    router = context.socket(zmq.ROUTER)
    bind_server(router, "tcp://127.0.0.1:*", server, silence=SECONDS, max_bytes=1 << 20)
    port = int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    tap = Tap(("127.0.0.1", port))
    dealer = context.socket(zmq.DEALER)
    prepare_client(dealer, server.public, client, silence=SECONDS, max_bytes=1 << 20)
    dealer.connect(f"tcp://127.0.0.1:{tap.address[1]}")
    dealer.send(b"hello")
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(check.socket, zmq.POLLIN)
    deadline = time.monotonic() + SECONDS
    while router not in dict(poller.poll(100)):
        check.answer()
        assert time.monotonic() < deadline
    context.destroy(linger=0)
    return tap.close()


async def recorded_link(own: Credentials, link: LinkName) -> bytes:
    """What an attention rank with the right key says to an FFN rank with the right key."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    tap = Tap(listener.getsockname())
    loop = asyncio.get_running_loop()

    async def answer() -> None:
        peer, _ = await loop.sock_accept(listener)
        with peer:
            await accept(peer, own, lambda _: 0)

    answering = asyncio.create_task(answer())
    with socket.create_connection(tap.address) as peer:
        peer.setblocking(False)
        await connect(peer, own, link)
    await answering
    listener.close()
    return await asyncio.to_thread(tap.close)


class ControlStrangers:
    """Strangers at a port of the control path, where the keys ``server`` and ``client`` pass."""

    def __init__(
        self, address: Address, server: CurveKeys, client: CurveKeys, draw: random.Random
    ) -> None:
        self._address, self._draw = address, draw
        self._server, self._client = server.public, client
        self._context: zmq.Context[Any] = zmq.Context()
        self._waiting: list[zmq.Socket[Any]] = []
        self._recorded = recorded_curve(server, client)

    def kinds(self) -> Sequence[Stranger]:
        address, draw = self._address, self._draw
        other = CurveKeys.new()
        return (
            lambda: say(address),
            lambda: say(address, draw.randbytes(draw.randint(1, 4096))),
            lambda: say(address, greeting(b"NULL"), b"\x04\x06\x05READY", hear=True),
            lambda: say(address, greeting(b"CURVE"), LONG_FRAME, hear=True),
            lambda: say(address, greeting(b"CURVE"), HELLO + draw.randbytes(192), hear=True),
            lambda: say(address, self._recorded),
            lambda: say(address, self._recorded[:64], self._recorded[64:], hear=True),
            lambda: self._speak_curve(self._server, other, b"hello"),
            lambda: self._speak_curve(other.public, self._client, b"hello"),
            lambda: self._speak_curve(self._server, self._client, draw.randbytes(100)),
        )

    def _speak_curve(self, server: str, client: CurveKeys, message: bytes) -> None:
        one = self._context.socket(zmq.DEALER)
        one.setsockopt(zmq.RECONNECT_IVL, -1)
        prepare_client(one, server, client, silence=SECONDS, max_bytes=1 << 20)
        one.connect("tcp://{}:{}".format(*self._address))
        one.send(message)
        self._waiting.append(one)
        if len(self._waiting) >= BATCH:
            self.leave()

    def leave(self) -> None:
        time.sleep(0.2)  # handshakes take their way there and back
        for one in self._waiting:
            one.close(linger=0)
        self._waiting.clear()


class LinkStrangers:
    """Strangers at a port where links are made, of which ``own`` are the credentials."""

    def __init__(self, address: Address, own: Credentials, draw: random.Random) -> None:
        self._address, self._own, self._draw = address, own, draw
        self._link = LinkName(0, 0, 0)
        self._recorded = asyncio.run(recorded_link(own, self._link))

    def kinds(self) -> Sequence[Stranger]:
        address, draw, own = self._address, self._draw, self._own
        hello, proof = self._recorded[:-33], self._recorded[-33:]
        return (
            lambda: say(address),
            lambda: say(address, draw.randbytes(draw.randint(1, 400))),
            lambda: say(address, hello[: draw.randint(1, len(hello) - 1)]),
            lambda: say(address, hello, proof, hear=True),
            lambda: say(address, self._recorded),
            lambda: say(address, hello, bytes([Verdict.WELCOME]) + draw.randbytes(32), hear=True),
            lambda: say(address, hello, draw.randbytes(draw.randint(1, 32)), hear=True),
            lambda: self._greet(replace(own, key=draw.randbytes(32))),
            lambda: self._greet(replace(own, deployment=draw.randbytes(16))),
            lambda: self._greet(replace(own, max_row_bytes=draw.getrandbits(32))),
        )

    def _greet(self, own: Credentials) -> None:
        async def greet() -> None:
            with socket.create_connection(self._address, SECONDS) as peer:
                peer.setblocking(False)
                await asyncio.wait_for(connect(peer, own, self._link), SECONDS)

        with contextlib.suppress(OSError, HandshakeError):
            asyncio.run(greet())

    def leave(self) -> None:
        """Nothing is left open."""


class HTTPStrangers:
    """Strangers at the port of the front end: what they send is no request, or has no answer."""

    def __init__(self, address: Address, draw: random.Random) -> None:
        self._address, self._draw = address, draw

    def kinds(self) -> Sequence[Stranger]:
        address, draw = self._address, self._draw
        post = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        return (
            lambda: say(address),
            lambda: say(address, draw.randbytes(draw.randint(1, 4096))),
            lambda: say(address, b"GET / HTTP/9.9\r\n\r\n"),
            lambda: say(address, b"GET /health HTTP/1.1\r\nHost: a\r\n" + draw.randbytes(100)),
            lambda: say(address, post + b"Content-Length: -1\r\n\r\n{}"),
            lambda: say(address, post + b"Content-Length: 9223372036854775808\r\n\r\n{}"),
            lambda: say(address, post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
            lambda: say(address, post + b"Content-Length: 50\r\n\r\n" + draw.randbytes(50)),
            lambda: say(address, post + b"Content-Length: 50\r\n\r\n{"),
            lambda: say(address, greeting(b"CURVE") + HELLO + bytes(192)),
        )

    def leave(self) -> None:
        """Nothing is left open."""


Strangers = ControlStrangers | LinkStrangers | HTTPStrangers


def at_launchers(running: Deployment, keys: Path, draw: random.Random) -> Strangers:
    found = read_deployment_keys(keys)
    address = running.host_address.numeric
    return ControlStrangers((address.host, address.port), found.server, found.client, draw)


def at_scheduler(running: Deployment, keys: Path, draw: random.Random) -> Strangers:
    server = load_scheduler_keys(running.control_keys).own
    address = running.host_address.numeric
    client = read_deployment_keys(keys).client
    return ControlStrangers((address.host, address.port + 1), server, client, draw)


def at_links(running: Deployment, keys: Path, draw: random.Random) -> Strangers:
    settled = running.network_links
    assert settled is not None
    own = Credentials(
        key=read_deployment_keys(keys).data_key,
        deployment=bytes.fromhex(settled.start),
        max_rows=running.max_step_tokens,
        max_row_bytes=settled.max_row_bytes,
        incarnation=1000,
    )
    (address,) = settled.addresses.values()
    return LinkStrangers(address, own, draw)


def at_front_end(running: Deployment, _: Path, draw: random.Random) -> Strangers:
    return HTTPStrangers(("127.0.0.1", running.port), draw)


KINDS = {
    "launchers": at_launchers,
    "scheduler": at_scheduler,
    "links": at_links,
    "front end": at_front_end,
}


def main() -> None:
    kind, count, seed, port, keys = sys.argv[1:]
    strangers = KINDS[kind](find_running(int(port)), Path(keys), random.Random(int(seed)))
    kinds = strangers.kinds()
    for number in range(int(count)):
        kinds[number % len(kinds)]()
    strangers.leave()


if __name__ == "__main__":
    main()
