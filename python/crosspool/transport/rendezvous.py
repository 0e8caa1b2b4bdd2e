"""Where the device processes of one host tell each other, once, what the data path needs: some
bytes, and file descriptors of memory.

All of them name the same socket in the deployment's runtime folder, and the same members. The first
member listens, collects what every member brings, and gives all of it to all. A message is one
SOCK_SEQPACKET packet of plain fields; descriptors travel beside it (SCM_RIGHTS). Processes of other
users are refused, even if they could reach the folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_BYTES = 60_000
"""Of what one member brings."""
MAX_DESCRIPTORS = 64

_MAGIC = b"CPPEERS1"
_HEADER = struct.Struct("<8sHHI")
"""Magic, bytes of the name, descriptors, bytes brought."""
_PACKET_BYTES = _HEADER.size + 256 + MAX_BYTES
_RETRY_S = 0.02
_DESCRIPTOR = struct.Struct("i")
_CREDENTIALS = struct.Struct("3i")


class RendezvousError(RuntimeError):
    """The members did not all come, or somebody else did."""


@dataclass
class Brought:
    """What one member told the others. Whoever has it closes the descriptors."""

    payload: bytes = b""
    descriptors: list[int] = field(default_factory=list)

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


@contextlib.contextmanager
def exchange(
    address: Path, me: str, members: Sequence[str], mine: Brought, timeout: float
) -> Iterator[dict[str, Brought]]:
    """What every member brought, ``mine`` included, by its name; its descriptors are closed when
    the context ends, those of ``mine`` stay the caller's.

    Raises RendezvousError when a member does not come within ``timeout`` seconds, a process comes
    that is no member, or a member comes twice; ValueError when ``mine`` is too large."""
    if len(mine.payload) > MAX_BYTES or len(mine.descriptors) > MAX_DESCRIPTORS:
        raise ValueError(
            f"{len(mine.payload)} bytes and {len(mine.descriptors)} descriptors: at most"
            f" {MAX_BYTES} and {MAX_DESCRIPTORS} can be brought"
        )
    deadline = time.monotonic() + timeout
    found: dict[str, Brought] = {}
    try:
        if me == members[0]:
            found[me] = Brought(mine.payload, [os.dup(fd) for fd in mine.descriptors])
            _lead(address, members, deadline, found)
        else:
            _follow(address, (me, mine), members, deadline, found)
        yield found
    finally:
        for brought in found.values():
            brought.close()


def _lead(
    address: Path, members: Sequence[str], deadline: float, found: dict[str, Brought]
) -> None:
    """``found``: what the leader brings, to which the others' is added."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_socket())
        listener.bind(str(address))
        stack.callback(address.unlink)
        listener.listen(len(members))
        followers = []
        while missing := [name for name in members if name not in found]:
            waited = f"{', '.join(missing)} did not come to {address}"
            with _within(listener, deadline, waited):
                follower, _ = listener.accept()
            stack.enter_context(follower)
            _check_user(follower)
            with _within(follower, deadline, waited):
                name, brought = _receive(follower)
            if name not in missing:
                brought.close()
                raise RendezvousError(f"{name} came to {address}, of {', '.join(missing)}")
            found[name] = brought
            followers.append(follower)
        for follower in followers:
            for name, brought in found.items():
                with _within(follower, deadline, f"a member left {address}"):
                    _send(follower, name, brought)


def _follow(
    address: Path,
    mine: tuple[str, Brought],
    members: Sequence[str],
    deadline: float,
    found: dict[str, Brought],
) -> None:
    with _socket() as leader:
        waited = f"{members[0]} does not listen at {address}"
        while True:
            try:
                with _within(leader, deadline, waited):
                    leader.connect(str(address))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(_RETRY_S)
        _check_user(leader)
        with _within(leader, deadline, waited):
            _send(leader, *mine)
        while len(found) < len(members):
            missing = ", ".join(name for name in members if name not in found)
            with _within(leader, deadline, f"{missing} did not come to {address}"):
                name, brought = _receive(leader)
            if name not in members or name in found:
                brought.close()
                raise RendezvousError(f"{members[0]} tells of {name} at {address}")
            found[name] = brought


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextlib.contextmanager
def _within(peer: socket.socket, deadline: float, what: str) -> Iterator[None]:
    """Bounds the operations within by the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise RendezvousError(f"{what} in time")
    peer.settimeout(left)
    try:
        yield
    except TimeoutError:
        raise RendezvousError(f"{what} in time") from None
    except (BrokenPipeError, ConnectionResetError) as error:
        raise RendezvousError(f"{what}: {error.strerror}") from error


def _check_user(peer: socket.socket) -> None:
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    if user != os.getuid():
        raise RendezvousError(f"a process of user {user} came")


def _send(peer: socket.socket, name: str, brought: Brought) -> None:
    raw = name.encode()
    packet = _HEADER.pack(_MAGIC, len(raw), len(brought.descriptors), len(brought.payload))
    socket.send_fds(peer, [packet + raw + brought.payload], brought.descriptors)


def _receive(peer: socket.socket) -> tuple[str, Brought]:
    """Raises RendezvousError on a packet that is none of ours."""
    # socket.recv_fds drops its flags before Python 3.12.
    space = socket.CMSG_LEN(MAX_DESCRIPTORS * _DESCRIPTOR.size)
    packet, beside, flags, _ = peer.recvmsg(_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = [
        number
        for level, kind, raw in beside
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (number,) in _DESCRIPTOR.iter_unpack(raw[: len(raw) // 4 * 4])
    ]
    brought = Brought(b"", descriptors)
    try:
        if not packet:
            raise RendezvousError("a member left before it had told anything")
        cut = flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        if cut or len(packet) < _HEADER.size:
            raise RendezvousError("a packet came that is no member's")
        magic, name_bytes, count, payload_bytes = _HEADER.unpack_from(packet)
        end = _HEADER.size + name_bytes
        fits = len(packet) == end + payload_bytes and count == len(descriptors)
        if magic != _MAGIC or not fits:
            raise RendezvousError("a packet came that is no member's")
        brought.payload = packet[end:]
        return packet[_HEADER.size : end].decode(errors="replace"), brought
    except BaseException:
        brought.close()
        raise
