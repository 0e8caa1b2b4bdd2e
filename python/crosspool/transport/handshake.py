"""How both ends of a connection between hosts prove, before any message of a link, that they belong
to the same deployment, know its key, and speak of the same link.

Three messages of fixed size and one byte, C being the attention rank's end, which connects, and S
the FFN rank's::

    C -> S   hello      magic, version, 32 random bytes, deployment, link, sizes, incarnation
    S -> C   challenge  the same of S, a verdict, and HMAC(key, "S" + hello + challenge)
    C -> S   proof      a verdict, and HMAC(key, "C" + hello + challenge + verdict)
    S -> C   verdict

HMAC is HMAC-SHA256 over all that came before, with random bytes of both ends in it: nobody without
the key passes, and what passed once does not pass again. An end that refuses says why in its
verdict, so that both can tell their users; a verdict is only believed to that end. No end reads
more bytes than these, or takes memory for what it reads. The messages of links that follow are
neither encrypted nor authenticated one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hmac
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

VERSION = 1
"""Version of these messages and of those of links; both ends must have the same."""
KEY_BYTES = 32
ID_BYTES = 16
_MAGIC = b"CPLINK\r\n"
_RANDOM_BYTES = 32
_MAC_BYTES = 32
_GREETING = struct.Struct(f"<8sI{_RANDOM_BYTES}s{ID_BYTES}s5IQ")
"""Magic, version, random bytes, deployment, attention rank, lane, FFN rank, most rows, most bytes
of a row, incarnation."""


class Verdict(enum.IntEnum):
    """What an end thinks of the other."""

    WELCOME = 0
    VERSION = 1
    DEPLOYMENT = 2
    LINK = 3
    SIZES = 4
    KEY = 5
    EARLIER = 6


_REFUSALS = {
    Verdict.VERSION: "their versions differ: install the same CrossPool on all hosts",
    Verdict.DEPLOYMENT: "they belong to different deployments, or to different starts of one",
    Verdict.LINK: "there is no such link",
    Verdict.SIZES: "their links have room for different rows: give all hosts the same options",
    Verdict.KEY: "their keys differ: give all hosts the same key file",
    Verdict.EARLIER: "a later process of the same rank has connected already",
}


class HandshakeError(Exception):
    """The ends do not come together; the message says why, and which of them refuses."""


@dataclass(frozen=True)
class LinkName:
    """The link that a connection is for."""

    attention_rank: int
    lane: int
    ffn_rank: int

    def __str__(self) -> str:
        return f"attention rank {self.attention_rank}, lane {self.lane}, FFN rank {self.ffn_rank}"


@dataclass(frozen=True)
class Credentials:
    """What an end has to show, and asks of the other."""

    key: bytes
    """KEY_BYTES that all hosts of the deployment know, and nobody else."""
    deployment: bytes
    """ID_BYTES that name this start of the deployment. They are no secret."""
    max_rows: int
    max_row_bytes: int
    incarnation: int
    """Number of this device's process among those that have taken its place, from 1."""

    def __post_init__(self) -> None:
        for field, size in (("key", KEY_BYTES), ("deployment", ID_BYTES)):
            if len(getattr(self, field)) != size:
                raise ValueError(f"{field} has {len(getattr(self, field))} bytes, not {size}")

    def __repr__(self) -> str:
        return f"Credentials(deployment={self.deployment.hex()}, incarnation={self.incarnation})"


@dataclass(frozen=True)
class Greeted:
    """The other end of a connection that both have accepted."""

    link: LinkName
    incarnation: int


async def connect(
    peer: socket.socket, own: Credentials, link: LinkName, *, latest: int = 0
) -> Greeted:
    """Greets the FFN rank's end over a connected, non-blocking socket. An incarnation of it before
    ``latest`` is refused. The caller bounds the time.

    Raises HandshakeError, OSError."""
    loop = asyncio.get_running_loop()
    hello = _greeting(own, link)
    await loop.sock_sendall(peer, hello)
    challenge = await _read(peer, _GREETING.size + 1 + _MAC_BYTES)
    signed, mac = challenge[: _GREETING.size + 1], challenge[_GREETING.size + 1 :]
    greeting, said = signed[: _GREETING.size], signed[_GREETING.size]
    verdict = _look(greeting, own, link, latest)
    if verdict in (Verdict.WELCOME, Verdict.LINK) and said != Verdict.WELCOME:
        raise HandshakeError(f"the other end refuses this one: {_refusal(said)}")
    if verdict == Verdict.WELCOME and not _proves(own.key, b"S", (hello, signed), mac):
        verdict = Verdict.KEY
    answer = bytes([verdict])
    proof = _mac(own.key, b"C", hello, challenge, answer)
    with contextlib.suppress(OSError):
        await loop.sock_sendall(peer, answer + proof)
    if verdict != Verdict.WELCOME:
        raise HandshakeError(f"this end refuses the other: {_refusal(verdict)}")
    said = (await _read(peer, 1))[0]
    if said != Verdict.WELCOME:
        raise HandshakeError(f"the other end refuses this one: {_refusal(said)}")
    return Greeted(link, _incarnation(greeting))


async def accept(
    peer: socket.socket, own: Credentials, latest: Callable[[LinkName], int | None]
) -> Greeted:
    """Answers an attention rank's end over a connected, non-blocking socket. ``latest``: the latest
    incarnation that has had a link, 0 without one; None: the link is not here. The caller bounds
    the time.

    Raises HandshakeError, OSError."""
    loop = asyncio.get_running_loop()
    hello = await _read(peer, _GREETING.size)
    magic, version, *_ = _GREETING.unpack(hello)
    if magic != _MAGIC:
        raise HandshakeError("what came is no greeting of CrossPool")
    link = LinkName(*_GREETING.unpack(hello)[4:7]) if version == VERSION else LinkName(0, 0, 0)
    known = latest(link)
    verdict = _look(hello, own, link, known or 0)
    if verdict == Verdict.WELCOME and known is None:
        verdict = Verdict.LINK
    signed = _greeting(own, link) + bytes([verdict])
    challenge = signed + _mac(own.key, b"S", hello, signed)
    await loop.sock_sendall(peer, challenge)
    if verdict != Verdict.WELCOME:
        raise HandshakeError(f"this end refuses the other: {_refusal(verdict)}")
    answer = await _read(peer, 1 + _MAC_BYTES)
    said, mac = answer[0], answer[1:]
    if said != Verdict.WELCOME:
        raise HandshakeError(f"the other end refuses this one: {_refusal(said)}")
    if not _proves(own.key, b"C", (hello, challenge, answer[:1]), mac):
        verdict = Verdict.KEY
    await loop.sock_sendall(peer, bytes([verdict]))
    if verdict != Verdict.WELCOME:
        raise HandshakeError(f"this end refuses the other: {_refusal(verdict)}")
    return Greeted(link, _incarnation(hello))


def _greeting(own: Credentials, link: LinkName) -> bytes:
    return _GREETING.pack(
        _MAGIC,
        VERSION,
        secrets.token_bytes(_RANDOM_BYTES),
        own.deployment,
        link.attention_rank,
        link.lane,
        link.ffn_rank,
        own.max_rows,
        own.max_row_bytes,
        own.incarnation,
    )


def _look(greeting: bytes, own: Credentials, link: LinkName, latest: int) -> Verdict:
    """What this end thinks of a greeting, as far as no key is needed."""
    magic, version, _, deployment, *rest = _GREETING.unpack(greeting)
    *named, max_rows, max_row_bytes, incarnation = rest
    if magic != _MAGIC or version != VERSION:
        return Verdict.VERSION
    if deployment != own.deployment:
        return Verdict.DEPLOYMENT
    if LinkName(*named) != link:
        return Verdict.LINK
    if (max_rows, max_row_bytes) != (own.max_rows, own.max_row_bytes):
        return Verdict.SIZES
    return Verdict.EARLIER if incarnation < latest else Verdict.WELCOME


def _incarnation(greeting: bytes) -> int:
    return int(_GREETING.unpack(greeting)[-1])


def _mac(key: bytes, side: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, side + b"".join(parts), "sha256")


def _proves(key: bytes, side: bytes, parts: tuple[bytes, ...], mac: bytes) -> bool:
    return hmac.compare_digest(_mac(key, side, *parts), mac)


def _refusal(verdict: int) -> str:
    known = {int(one): text for one, text in _REFUSALS.items()}
    return known.get(verdict, f"for a reason that this version does not know ({verdict})")


async def _read(peer: socket.socket, nbytes: int) -> bytes:
    """Reads so many bytes and no more. Raises HandshakeError when the connection ends before."""
    loop = asyncio.get_running_loop()
    parts = b""
    while len(parts) < nbytes:
        part = await loop.sock_recv(peer, nbytes - len(parts))
        if not part:
            raise HandshakeError("the connection ended before both ends had proven themselves")
        parts += part
    return parts
