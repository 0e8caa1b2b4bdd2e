"""The device process's end of the control path: a DEALER towards the scheduler's ROUTER, over a
Unix socket on the scheduler's host, over TCP and CURVE from others."""

from __future__ import annotations

import msgspec
import zmq

from crosspool.config.deployment import Deployment
from crosspool.transport.control_keys import DeviceKeys, load_device_keys
from crosspool.transport.curve import ConnectionMonitor, prepare_client
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


class SchedulerLost(ConnectionError):
    """The connection to the scheduler of another host has broken, and messages with it: what the
    device process has and what the scheduler knows of it may differ."""


class DeviceSocket:
    """Carries messages to and from the scheduler, in order. The scheduler need not be there yet:
    what is sent waits until it is. ``keys``: those of a device process on another host than the
    scheduler's; ``silence`` is then the time, in seconds, after which the connection counts as
    broken."""

    def __init__(
        self,
        address: str,
        device: str,
        incarnation: int = 1,
        *,
        keys: DeviceKeys | None = None,
        silence: float = 0.0,
    ) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity_of(device, incarnation))
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._monitor: ConnectionMonitor | None = None
        self._joined = False
        if keys is not None:
            prepare_client(
                *(self._socket, keys.scheduler, keys.own),
                silence=silence,
                max_bytes=MAX_MESSAGE_BYTES,
            )
            self._monitor = ConnectionMonitor(self._socket)
        self._socket.connect(address)

    @classmethod
    def of(cls, deployment: Deployment, device: str, incarnation: int) -> DeviceSocket:
        """Opens the socket of a process of ``device``, which is on this host."""
        if deployment.node_rank == 0:
            return cls(deployment.control_address, device, incarnation)
        return cls(
            *(deployment.host_address.devices, device, incarnation),
            keys=load_device_keys(deployment.control_keys),
            silence=deployment.host_timeout,
        )

    def send(self, message: FromDevice) -> None:
        self._socket.send(encode(message))

    def receive(self) -> ToDevice | None:
        """Returns the next message, or None when none is there; never waits.

        Raises ValueError on a frame that is no message for a device, and SchedulerLost."""
        if self._monitor is not None:
            self._look_at_connection(self._monitor)
        if not self._socket.poll(0):
            return None
        frame = self._socket.recv(zmq.DONTWAIT)
        try:
            return decode_to_device(frame)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(
                f"the scheduler sent a frame that is no message for a device: {error}"
            ) from error

    def _look_at_connection(self, monitor: ConnectionMonitor) -> None:
        for happened in monitor.happened():
            if happened == "joined":
                self._joined = True
            elif happened == "refused":
                raise SchedulerLost("the scheduler refuses the key of this host")
            elif happened == "left" and self._joined:
                raise SchedulerLost("the connection to the scheduler has broken")

    def wait(self, timeout: float, descriptor: int | None = None) -> None:
        """Sleeps until a message is there, or the file descriptor is readable, at most ``timeout``
        seconds."""
        if descriptor is None:
            self._socket.poll(int(timeout * 1000))
            return
        zmq.zmq_poll([(self._socket, zmq.POLLIN), (descriptor, zmq.POLLIN)], int(timeout * 1000))

    def close(self) -> None:
        """Closes after giving sent messages up to two seconds to leave."""
        if self._monitor is not None:
            self._monitor.close()
        self._socket.close()
        self._context.term()
