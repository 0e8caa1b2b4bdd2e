"""The meeting at which the device processes of one host tell each other, once, what the data path
needs: some bytes.

All of them name the same socket in the deployment's runtime folder, and the same members. The first
member listens, collects what every member brings, and gives all of it to all. A message is one
SOCK_SEQPACKET packet of msgpack. Processes of other users are refused, even if they could reach the
folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

MAX_BYTES = 60_000
"""Most bytes that one member brings."""

_PACKET_BYTES = MAX_BYTES + 1024
_RETRY_S = 0.02
_CREDENTIALS = struct.Struct("3i")
"""struct ucred: process, user and group."""
_decoder = msgspec.msgpack.Decoder(tuple[str, bytes])
"""Name of the member, and what it brings."""


class RendezvousError(RuntimeError):
    """Some members did not come, or a process came that is no member."""


def exchange(
    address: Path, me: str, members: Sequence[str], mine: bytes, timeout: float
) -> dict[str, bytes]:
    """Returns what every member brought, ``mine`` included, by its name.

    Raises RendezvousError when a member does not come within ``timeout`` seconds, a process comes
    that is no member, or a member comes twice; ValueError when ``mine`` is too large."""
    if len(mine) > MAX_BYTES:
        raise ValueError(f"{len(mine)} bytes: at most {MAX_BYTES} can be brought")
    deadline = time.monotonic() + timeout
    if me == members[0]:
        return _lead(address, (me, mine), members, deadline)
    return _follow(address, (me, mine), members, deadline)


def _lead(
    address: Path, mine: tuple[str, bytes], members: Sequence[str], deadline: float
) -> dict[str, bytes]:
    """Collects what the followers bring, and tells all of them."""
    found = dict([mine])
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_socket())
        address.unlink(missing_ok=True)  # of a leader that was killed
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
                raise RendezvousError(f"{name} came to {address}, of {', '.join(missing)}")
            found[name] = brought
            followers.append(follower)
        for follower in followers:
            for name, brought in found.items():
                with _within(follower, deadline, f"a member left {address}"):
                    _send(follower, name, brought)
    return found


def _follow(
    address: Path, mine: tuple[str, bytes], members: Sequence[str], deadline: float
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
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
                raise RendezvousError(f"{members[0]} tells of {name} at {address}")
            found[name] = brought
    return found


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextlib.contextmanager
def _within(peer: socket.socket, deadline: float, what: str) -> Iterator[None]:
    """Raises RendezvousError, with ``what`` in its text, where the operations within do not end
    before the deadline."""
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


def _send(peer: socket.socket, name: str, brought: bytes) -> None:
    peer.send(msgspec.msgpack.encode((name, brought)))


def _receive(peer: socket.socket) -> tuple[str, bytes]:
    """Raises RendezvousError for a packet that no member sent."""
    packet, _, flags, _ = peer.recvmsg(_PACKET_BYTES)
    if not packet:
        raise RendezvousError("a member left before it had told anything")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise RendezvousError("a packet came that no member sent whole")
    try:
        return _decoder.decode(packet)
    except msgspec.DecodeError as error:
        raise RendezvousError(f"a packet came that no member sent: {error}") from None
