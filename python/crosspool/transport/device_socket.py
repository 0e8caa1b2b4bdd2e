"""The device process's end of the control path: a DEALER towards the scheduler's ROUTER."""

from __future__ import annotations

import msgspec
import zmq

from crosspool.transport.messages import (
    MAX_MESSAGE_BYTES,
    FromDevice,
    ToDevice,
    decode_to_device,
    encode,
)

_LINGER_MS = 2000


def identity_of(device: str, incarnation: int) -> bytes:
    """Returns how the scheduler's ROUTER knows a process of ``device``: ``cpu:0#2`` is its second.
    What a dead process has sent, and what is sent to it, is so never taken for another's."""
    return f"{device}#{incarnation}".encode()


def read_identity(identity: bytes) -> tuple[str, int]:
    """Returns device and incarnation. Raises ValueError for what no device process calls itself."""
    device, mark, number = identity.decode().rpartition("#")
    if not mark or not number.isascii() or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{identity!r} is no device's identity")
    return device, int(number)


class DeviceSocket:
    """Carries messages to and from the scheduler, in order. The scheduler need not be there yet:
    what is sent waits until it is."""

    def __init__(self, address: str, device: str, incarnation: int = 1) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity_of(device, incarnation))
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)

    def send(self, message: FromDevice) -> None:
        self._socket.send(encode(message))

    def receive(self) -> ToDevice | None:
        """Returns the next message, or None when none is there; never waits.

        Raises ValueError on a frame that is no message for a device."""
        if not self._socket.poll(0):
            return None
        frame = self._socket.recv(zmq.DONTWAIT)
        try:
            return decode_to_device(frame)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(
                f"the scheduler sent a frame that is no message for a device: {error}"
            ) from error

    def wait(self, timeout: float, descriptor: int | None = None) -> None:
        """Sleeps until a message is there, or the file descriptor is readable, at most ``timeout``
        seconds."""
        if descriptor is None:
            self._socket.poll(int(timeout * 1000))
            return
        zmq.zmq_poll([(self._socket, zmq.POLLIN), (descriptor, zmq.POLLIN)], int(timeout * 1000))

    def close(self) -> None:
        """Closes after giving sent messages up to two seconds to leave."""
        self._socket.close()
        self._context.term()
