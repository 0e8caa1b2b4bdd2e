"""Loopback TCP for tests of links between hosts: pairs of sockets, and a wire that carries bytes in
random pieces until it is cut."""

from __future__ import annotations

import contextlib
import random
import socket
import threading


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Returns both ends of a non-blocking TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    for end in (here, there):
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return here, there


class Wire:
    """Two connections, and what carries bytes between their inner ends."""

    def __init__(self, generator: random.Random) -> None:
        self.here, self._near = tcp_pair()
        self.there, self._far = tcp_pair()
        self._random = generator
        self._held = {self._near: b"", self._far: b""}
        """What was taken from a socket and has not been passed on."""

    def carry(self, most: int = 3000) -> None:
        """Takes some bytes from either end, and passes some on."""
        for source, target in ((self._near, self._far), (self._far, self._near)):
            with contextlib.suppress(BlockingIOError):
                self._held[source] += source.recv(self._random.randint(1, most))
            some = self._held[source][: self._random.randint(0, most)]
            if some:
                with contextlib.suppress(BlockingIOError):
                    sent = target.send(some)
                    self._held[source] = self._held[source][sent:]

    def cut(self) -> None:
        """Ends both connections; what was on its way is lost."""
        self._near.close()
        self._far.close()


class Proxy:
    """Passes connections on to an address, in a thread, until they are cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Ends all connections, at whatever byte they are; returns how many there were."""
        with self._lock:
            ended, self._open = self._open, []
        for end in ended:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(ended) // 2

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
                with self._lock:
                    self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, target), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError), source:
        while some := source.recv(1 << 16):
            target.sendall(some)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
