"""One HTTP exchange over a socket of its own, which reads the answer while it still sends: a server
may refuse a body before it has read it."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

LOOPBACK = "127.0.0.1"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What comes before the answer where a client asks whether it may send its body."""


@dataclass(frozen=True)
class Outcome:
    """What became of a hostile request."""

    status: int
    """HTTP status; 0 without one."""
    seconds: float
    """Time until the answer was whole, or until it was given up."""
    note: str = ""
    """Beginning of the answer, or what was seen instead of one."""
    good: bool | None = None
    """Verdict of a request that is more than one exchange; None where the status decides."""

    def answered_well(self, refused_within: float) -> bool:
        """Return whether the request was served, or refused with a 4xx soon enough. 429 and 503
        are answers of a full server."""
        if self.good is not None:
            return self.good
        if 400 <= self.status < 500 or self.status == 503:
            return self.seconds < refused_within
        return 200 <= self.status < 300


def head(path: str, length: int | None, headers: dict[str, str] | None = None) -> bytes:
    """Return the head of a POST of ``length`` bytes; None is a chunked body."""
    fields = {"Host": LOOPBACK, "Content-Type": "application/json", **(headers or {})}
    if length is None:
        fields["Transfer-Encoding"] = "chunked"
    else:
        fields["Content-Length"] = str(length)
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def post(
    port: int,
    path: str,
    body: bytes | Any,
    *,
    headers: dict[str, str] | None = None,
    timeout: float = 60.0,
) -> Outcome:
    """POST ``body``, as JSON where it is no bytes, on a new connection."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return send(
        port, head(path, len(data), {"Connection": "close", **(headers or {})}), data, timeout
    )


def send(port: int, start: bytes, body: bytes, timeout: float) -> Outcome:
    """Send ``start`` and ``body`` as they are and read one answer until the server closes the
    connection or the answer is whole."""
    began = time.monotonic()
    received = bytearray()
    try:
        with socket.create_connection((LOOPBACK, port), timeout=timeout) as connection:
            connection.setblocking(False)
            _pump(connection, memoryview(start + body), received, began + timeout)
    except OSError as error:
        status = status_of(received)
        note = f"{type(error).__name__} after {len(received)} bytes of answer"
        return Outcome(status, time.monotonic() - began, note, None if status else False)
    return Outcome(status_of(received), time.monotonic() - began, _note(bytes(received)))


def _pump(
    connection: socket.socket, unsent: memoryview, received: bytearray, deadline: float
) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while not whole(received):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for _, mask in selector.select(left):
                if mask & selectors.EVENT_READ:
                    part = connection.recv(1 << 20)
                    if not part:
                        return
                    received += part
                    if received.startswith(_CONTINUE):
                        del received[: len(_CONTINUE)]
                if mask & selectors.EVENT_WRITE:
                    if unsent:
                        with contextlib.suppress(BlockingIOError):
                            unsent = unsent[connection.send(unsent[: 1 << 20]) :]
                    else:
                        selector.modify(connection, selectors.EVENT_READ)


def whole(received: bytearray) -> bool:
    """Return whether ``received`` is a whole HTTP answer, by its length or its last chunk."""
    start, end, rest = bytes(received[:65536]).partition(b"\r\n\r\n")
    if not end:
        return False
    fields = start.lower()
    if b"transfer-encoding: chunked" in fields:
        return received.endswith(b"0\r\n\r\n")
    _, named, length = fields.partition(b"content-length:")
    if not named:
        return False
    body = len(received) - len(start) - len(end)
    del rest
    return body >= int(length.split(b"\r\n", 1)[0])


def status_of(received: bytes | bytearray) -> int:
    words = bytes(received[:64]).split(b" ", 2)
    return int(words[1]) if len(words) > 2 and words[1].isdigit() else 0


def _note(received: bytes) -> str:
    if not received:
        return "no answer"
    text = received.partition(b"\r\n\r\n")[2][:400].decode(errors="replace")
    return text if whole(bytearray(received)) else f"answer cut: {text}"
