"""Descriptors of memory that outlive the processes that made the memory.

Memory that is exported as a descriptor, a GPU's too, stays as long as anybody has that descriptor
open. The launcher makes a pair of sockets for each device, which every device process inherits. Who
makes a device's memory sends its descriptor through the pair. There it stays in the queue, which
the kernel keeps as long as the launcher lives: others only look at it (MSG_PEEK), the device's next
process as well as its peers. So what keeps the memory of GPUs needs neither CUDA nor a thread.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence

_NUMBER_BYTES = 8
_DESCRIPTOR = struct.Struct("i")


class KeptDescriptors:
    """For each place, a descriptor and its number of bytes, once somebody has kept them there."""

    def __init__(self, fds: Sequence[int]) -> None:
        """``fds``: those of another object, which this one closes."""
        sockets = [socket.socket(fileno=fd) for fd in fds]
        self._pairs = list(zip(sockets[::2], sockets[1::2], strict=True))

    @classmethod
    def create(cls, places: int) -> KeptDescriptors:
        """Makes as many places. Raises OSError when the system refuses."""
        fds = []
        for _ in range(places):
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fds += [end.detach() for end in pair]
        return cls(fds)

    @property
    def fds(self) -> list[int]:
        """What a process inherits."""
        return [end.fileno() for pair in self._pairs for end in pair]

    def keep(self, place: int, descriptor: int, nbytes: int) -> None:
        """Keeps a descriptor; the caller closes its own. Nobody has kept one there before."""
        number = nbytes.to_bytes(_NUMBER_BYTES, "little")
        socket.send_fds(self._pairs[place][0], [number], [descriptor])

    def find(self, place: int, timeout: float) -> tuple[int, int] | None:
        """Returns the descriptor, which the caller closes, and its number of bytes; None when
        nobody has kept one within ``timeout`` seconds."""
        end = self._pairs[place][1]
        if not select.select([end], [], [], max(0.0, timeout))[0]:
            return None
        # Before Python 3.12 socket.recv_fds does not pass flags on.
        flags = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
        room = socket.CMSG_SPACE(_DESCRIPTOR.size)
        number, ((_, _, passed),), _, _ = end.recvmsg(_NUMBER_BYTES, room, flags)
        (descriptor,) = _DESCRIPTOR.unpack(passed)
        return descriptor, int.from_bytes(number, "little")

    def close(self) -> None:
        for end in (end for pair in self._pairs for end in pair):
            end.close()
