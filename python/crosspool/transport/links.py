"""The one place that knows all interconnects: which links two devices share, and who opens them.

Within a device nothing crosses. CPU devices of one host share a segment of memory
(:mod:`crosspool.transport.shared_memory`), which its launcher makes and every device process
inherits; between hosts each link has a connection (:mod:`crosspool.transport.network_links`). GPUs
of one host have what ``gpu_links`` names, one of GPU_LINKS, beside the segment.

A further interconnect is a module with an :class:`Interconnect`, or for GPUs with a function like
``peer_memory.join``, and its line in :func:`create` and :func:`join`, or in GPU_LINKS.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.models.spec import DTYPE_BYTES, ModelSpec
from crosspool.transport import nvshmem, peer_memory, shared_memory
from crosspool.transport.connector import Peers
from crosspool.transport.data_path import (
    AttentionLink,
    FFNLink,
    between_hosts,
    remote_pairs,
    within_hosts,
)
from crosspool.transport.device_links import DeviceLinks
from crosspool.transport.handshake import Credentials
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.lane_layout import LinkLayout, LinkPlace
from crosspool.transport.network_links import NetworkTransport
from crosspool.transport.shared_memory import SharedMemoryTransport

if TYPE_CHECKING:
    from crosspool.kernels.cuda_driver import CudaDriver

ROW_ROOM = 32 << 10
"""Bytes of a row for which links between CPU devices have room at least, for models that come
later: 8,192 numbers of float32. Room that nothing is written to takes no memory."""
_MEETING_SECONDS = 120.0
"""Seconds that a device process waits for the others to come to the meeting."""

A_co = TypeVar("A_co", covariant=True)
F_co = TypeVar("F_co", covariant=True)
L = TypeVar("L")


class OpensLinks(Protocol[A_co, F_co]):
    """Opens one device's ends of its links to other devices, in the form that a loop takes."""

    def attention_link(self, lane: int, ffn_rank: int) -> A_co:
        """The end of this device's attention rank."""

    def ffn_link(self, attention_rank: int, lane: int) -> F_co:
        """The end of this device's FFN rank."""


class Interconnect(OpensLinks[AttentionLink, FFNLink], Protocol):
    """One device's ends of its links to other devices, and what wakes it when a peer has used one.

    Links are for the host loop; their places, laid out as in lanes.h, are for native threads."""

    def attention_place(self, lane: int, ffn_rank: int) -> LinkPlace:
        """Where the link of :meth:`attention_link` lies."""

    def ffn_place(self, attention_rank: int, lane: int) -> LinkPlace:
        """Where the link of :meth:`ffn_link` lies."""

    @property
    def max_row_bytes(self) -> int:
        """Bytes of the widest row that a link has room for."""

    @property
    def doorbell_address(self) -> int:
        """Address of this device's doorbell, which stays there as long as the interconnect does."""

    @property
    def network_address(self) -> int:
        """Address of the native network with which native loops wait; 0 where no peer is on another
        host."""

    def wait(self, timeout: float) -> bool:
        """Returns when a peer has rung since the last call, or after ``timeout`` seconds; says
        whether one has."""


def open_ends(
    deployment: Deployment,
    device: Device,
    *,
    local: Callable[[int, int, int], L],
    remote: OpensLinks[A_co, F_co] | None,
) -> tuple[list[list[A_co | L]], list[F_co | L]]:
    """Opens the device's end of every link of its ranks.

    Returns the ends of the attention rank, indexed [lane][FFN rank], and those of the FFN rank,
    lane by lane and within a lane by attention rank; without the rank, none. A link within the
    device is in both: ``local`` makes it, from (attention rank, lane, FFN rank). ``remote`` opens
    the others; None: the device has no peers.

    Raises RuntimeError when it has peers and ``remote`` is None."""
    lanes = range(deployment.lanes)
    kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
    if remote is None and len(deployment.devices) > 1:
        raise RuntimeError(
            f"device {device.name} has peers on other devices: pass --lanes-fd, or how to find them"
        )
    own: dict[int, L] = {}
    if device in kv_pool and device in weight_pool:
        pair = kv_pool.index(device), weight_pool.index(device)
        own = {lane: local(pair[0], lane, pair[1]) for lane in lanes}
    outgoing: list[list[A_co | L]] = [[] for _ in lanes if device in kv_pool]
    for lane, ends in enumerate(outgoing):
        for rank, peer in enumerate(weight_pool):
            ends.append(
                own[lane] if remote is None or peer == device else remote.attention_link(lane, rank)
            )
    served: list[F_co | L] = []
    for lane in lanes if device in weight_pool else ():
        for rank, peer in enumerate(kv_pool):
            served.append(
                own[lane] if remote is None or peer == device else remote.ffn_link(rank, lane)
            )
    return outgoing, served


def row_bytes(spec: ModelSpec) -> int:
    """Bytes of a row of the model that crosses a link: one hidden state."""
    return spec.hidden * DTYPE_BYTES[spec.dtype]


def max_row_bytes(specs: Mapping[int, ModelSpec]) -> int:
    """Bytes of the widest row of any model that crosses a link."""
    return max((row_bytes(spec) for spec in specs.values()), default=0)


def room_for_rows(specs: Mapping[int, ModelSpec]) -> int:
    """Bytes of the widest row that links between CPU devices are made for."""
    return max(max_row_bytes(specs), ROW_ROOM)


def check_reach(deployment: Deployment) -> None:
    """Raises ConfigError where ranks that share a link have none that reaches: on different hosts,
    and on a GPU."""
    for attention_rank, ffn_rank in between_hosts(deployment):
        attention = deployment.kv_pool_devices[attention_rank]
        ffn = deployment.weight_pool_devices[ffn_rank]
        if not (attention.is_cpu and ffn.is_cpu):
            raise ConfigError(
                f"kv_pool_devices, weight_pool_devices: {attention.name} and {ffn.name} are on "
                "different hosts, and only CPUs are linked over a network: name devices of one "
                "host, or CPUs"
            )


def create(deployment: Deployment, specs: Mapping[int, ModelSpec]) -> int | None:
    """Makes, in a host's launcher, what its device processes inherit to reach each other.

    Returns the file descriptor that each of them passes to :func:`join` or :func:`join_gpus`; None:
    every link lies within a device, or between hosts. Raises OSError when the system refuses,
    ConfigError as :func:`check_reach` does."""
    check_reach(deployment)
    kv_pool, own = deployment.kv_pool_devices, deployment.own_devices
    if not any(kv_pool[attention_rank] in own for attention_rank, _ in within_hosts(deployment)):
        return None
    return shared_memory.create(deployment, room_for_rows(specs))


def keep_memory(deployment: Deployment) -> KeptDescriptors:
    """Makes, in the launcher, what keeps the memory of the devices' links when a device process
    dies; each of them inherits it and passes it to :func:`join_gpus`. It has no place where links
    lie elsewhere. Raises OSError when the system refuses."""
    in_peers = deployment.gpu_links == "peer" and not any(d.is_cpu for d in deployment.devices)
    needed = in_peers and bool(remote_pairs(deployment))
    return KeptDescriptors.create(len(deployment.devices) if needed else 0)


def find_peers(
    deployment: Deployment, device: Device, listener_fd: int | None, incarnation: int
) -> Peers | None:
    """Returns how a device's process finds the devices of other hosts; None where it has no links
    to them. ``listener_fd``: the socket at which it listens, if others connect to it; it stays
    open. ``incarnation``: that of the process. Raises OSError."""
    settled = deployment.network_links
    ends = {
        end
        for attention_rank, ffn_rank in between_hosts(deployment)
        for end in (
            deployment.kv_pool_devices[attention_rank],
            deployment.weight_pool_devices[ffn_rank],
        )
    }
    if settled is None or device not in ends:
        return None
    credentials = Credentials(
        key=deployment.data_key.read_bytes(),
        deployment=bytes.fromhex(settled.start),
        max_rows=deployment.max_step_tokens,
        max_row_bytes=settled.max_row_bytes,
        incarnation=incarnation,
    )
    listener = None if listener_fd is None else socket.socket(fileno=os.dup(listener_fd))
    return Peers(credentials, listener, settled.addresses)


def join(
    deployment: Deployment,
    device: Device,
    lanes_fd: int | None,
    peers: Peers | None,
    *,
    resources: contextlib.ExitStack,
) -> Interconnect | None:
    """Returns the CPU device's ends of the links to other devices, which may be used until
    ``resources`` are given back; None where it has none.

    ``lanes_fd``: what :func:`create` made; it is closed. ``peers``: how to find the devices of
    other hosts; needed where the device has links to them."""
    shared = None
    if lanes_fd is not None:
        with _taken(lanes_fd):
            shared = SharedMemoryTransport(lanes_fd, deployment, device)
    if peers is None:
        return shared
    network = NetworkTransport(deployment, device, peers, on_this_host=shared)
    resources.callback(network.close)
    return network


class JoinsGPUs(Protocol):
    """Makes a GPU's links to the other devices, together with their processes."""

    def __call__(
        self,
        deployment: Deployment,
        device: Device,
        layout: LinkLayout,
        driver: CudaDriver,
        kept: KeptDescriptors,
        *,
        resources: contextlib.ExitStack,
        timeout: float,
    ) -> DeviceLinks: ...


GPU_LINKS: Mapping[str, JoinsGPUs] = {"peer": peer_memory.join, "nvshmem": nvshmem.join}
"""The interconnects between GPUs, by the name that ``gpu_links`` gives them."""


@dataclass(frozen=True)
class GPUPeers:
    """One GPU's ends of its links to other devices."""

    links: DeviceLinks
    host: SharedMemoryTransport | None
    """Signals, headers and doorbells in the host's memory, for the host loop. A resident loop polls
    ``links``."""


def join_gpus(
    deployment: Deployment,
    device: Device,
    lanes_fd: int | None,
    kept: KeptDescriptors,
    *,
    specs: Mapping[int, ModelSpec],
    driver: CudaDriver,
    resources: contextlib.ExitStack,
) -> GPUPeers | None:
    """Returns the GPU's ends of its links to other devices; None where it has none.

    ``lanes_fd``: as for :func:`join`; ``kept``: what :func:`keep_memory` made; it is closed. Raises
    ConfigError when a GPU cannot be reached so, RendezvousError when a device does not come."""
    if lanes_fd is None:
        return None
    with _taken(lanes_fd), contextlib.closing(kept):
        layout = LinkLayout(deployment.max_step_tokens, max_row_bytes(specs))
        make = GPU_LINKS[deployment.gpu_links]
        links = make(
            *(deployment, device, layout, driver, kept),
            resources=resources,
            timeout=_MEETING_SECONDS,
        )
        host = None
        if deployment.loop == "host":
            host = SharedMemoryTransport(lanes_fd, deployment, device, on_gpu=links)
        return GPUPeers(links, host)


@contextlib.contextmanager
def _taken(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)
