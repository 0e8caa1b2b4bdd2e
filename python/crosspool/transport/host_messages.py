"""What the launchers of a deployment's hosts tell each other.

The launcher of node 0 binds one ROUTER at the deployment's ``dist_init_addr``; that of every other
host connects a DEALER. Both are prepared by :mod:`crosspool.transport.curve`. Each frame is one
msgpack-encoded message of the unions below. Either side speaks at least every ``BEAT_SECONDS``.
"""

from __future__ import annotations

import msgspec

from crosspool.config.deployment import Deployment

VERSION = 1
"""The version that :class:`Hello` carries; any change of a message below raises it."""
MAX_MESSAGE_BYTES = 4 << 20
"""Who sends more is cut off. A deployment of 256 models takes less than a tenth."""
BEAT_SECONDS = 0.5


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a host has."""

    cores: tuple[int, ...]
    """Cores that its processes may use."""
    available_bytes: int
    """Memory that processes may take."""
    address: str
    """Where other hosts reach it: the address from which it reaches node 0."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """A launcher comes, comes back, or still waits; :class:`Waiting`, :class:`Begin` or
    :class:`HostRefused` is the answer."""

    version: int
    crosspool: str
    """Version of CrossPool."""
    deployment: str
    """Id of the deployment, from its key file."""
    node: int
    nnodes: int
    launcher: str
    """Something that no other launcher calls itself."""
    facts: HostFacts


class Alive(msgspec.Struct, frozen=True, kw_only=True, tag="alive"):
    """The sender goes on."""


class DeviceGone(msgspec.Struct, frozen=True, kw_only=True, tag="device_gone"):
    """A device's process has ended, and the launcher starts another one."""

    session: int
    device: str
    incarnation: int
    cause: str


class HostLeaves(msgspec.Struct, frozen=True, kw_only=True, tag="host_leaves"):
    """The launcher ends."""

    cause: str
    comes_back: bool
    """Whether another launcher of this host may go on; if not, the whole server ends."""


ToNode0 = Hello | Alive | DeviceGone | HostLeaves


class Waiting(msgspec.Struct, frozen=True, kw_only=True, tag="waiting"):
    """There is nothing to do yet; the sender goes on."""

    message: str
    """What is waited for."""


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """Run these devices until this session ends: with the next one, with :class:`End`, or when node
    0 is silent for too long. Processes of an earlier session end first."""

    launcher: str
    """Something that no other launcher of node 0 calls itself."""
    session: int
    """The number of the session, which grows."""
    deployment: Deployment
    """It has neither keys nor folders of node 0."""
    control_key: str
    """Public key of the scheduler for device processes. Every scheduler has another, so that no
    process that has spoken to an earlier one can speak to it."""
    incarnations: dict[str, int]
    """The least incarnation of each device's first process."""


class HostRefused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The launcher is not taken, and ends."""

    reason: str


class End(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """The server ends, and so do all its hosts."""


ToHost = Alive | Waiting | Begin | HostRefused | End

_encoder = msgspec.msgpack.Encoder()
_to_node0 = msgspec.msgpack.Decoder(ToNode0)
_to_host = msgspec.msgpack.Decoder(ToHost)


def encode(message: ToNode0 | ToHost) -> bytes:
    return _encoder.encode(message)


def decode_to_node0(frame: bytes) -> ToNode0:
    """Raises msgspec.DecodeError or, where it is nested too deep, RecursionError for anything that
    is no message to node 0."""
    return _to_node0.decode(frame)


def decode_to_host(frame: bytes) -> ToHost:
    """Raises msgspec.DecodeError or, where it is nested too deep, RecursionError for anything that
    is no message to a host."""
    return _to_host.decode(frame)
