"""Which links two devices share, and who opens them: the one place that knows all interconnects.

Ranks on the same device share no memory beside their process's. Devices on CPUs share a segment
(:mod:`crosspool.transport.shared_memory`), which the launcher makes and every device process
inherits. GPUs have what ``gpu_links`` names, one of GPU_LINKS.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.transport import nvshmem, peer_memory
from crosspool.transport.device_links import DeviceLinks
from crosspool.transport.lane_layout import LinkLayout
from crosspool.transport.shared_memory import SharedMemoryTransport

if TYPE_CHECKING:
    from crosspool.kernels.cuda_driver import CudaDriver

_MEETING_SECONDS = 120.0
"""How long a device process waits for the others to be as far."""

A_co = TypeVar("A_co", covariant=True)
F_co = TypeVar("F_co", covariant=True)
L = TypeVar("L")


class OpensLinks(Protocol[A_co, F_co]):
    """Opens one device's ends of its links to other devices, in the form that a loop takes."""

    def attention_link(self, lane: int, ffn_rank: int) -> A_co:
        """The end of this device's attention rank."""

    def ffn_link(self, attention_rank: int, lane: int) -> F_co:
        """The end of this device's FFN rank."""


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
    the others; None: the device has no peers."""
    lanes = range(deployment.lanes)
    kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
    own: dict[int, L] = {}
    if device in kv_pool and device in weight_pool:
        pair = kv_pool.index(device), weight_pool.index(device)
        own = {lane: local(pair[0], lane, pair[1]) for lane in lanes}
    outgoing: list[list[A_co | L]] = []
    served: list[F_co | L] = []
    if device in kv_pool:
        outgoing = [
            [
                own[lane] if peer == device else _joined(remote).attention_link(lane, rank)
                for rank, peer in enumerate(weight_pool)
            ]
            for lane in lanes
        ]
    if device in weight_pool:
        served = [
            own[lane] if peer == device else _joined(remote).ffn_link(rank, lane)
            for lane in lanes
            for rank, peer in enumerate(kv_pool)
        ]
    return outgoing, served


def _joined(remote: OpensLinks[A_co, F_co] | None) -> OpensLinks[A_co, F_co]:
    if remote is None:
        raise RuntimeError("a device has peers on other devices: pass --lanes-fd")
    return remote


def join(
    deployment: Deployment, device: Device, lanes_fd: int | None
) -> SharedMemoryTransport | None:
    """Returns the device's ends of the links to other devices; None where it has none.

    ``lanes_fd``: what :func:`create` made; it is closed."""
    if lanes_fd is None:
        return None
    try:
        return SharedMemoryTransport(lanes_fd, deployment, device)
    finally:
        os.close(lanes_fd)


class JoinsGPUs(Protocol):
    """Makes a GPU's links to the other devices, together with their processes."""

    def __call__(
        self,
        deployment: Deployment,
        device: Device,
        layout: LinkLayout,
        driver: CudaDriver,
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
    *,
    max_row_bytes: int,
    driver: CudaDriver,
    resources: contextlib.ExitStack,
) -> GPUPeers | None:
    """Returns the GPU's ends of its links to other devices; None where it has none.

    ``lanes_fd``: as for :func:`join`; ``max_row_bytes``: the widest row of any model. Raises
    ConfigError when a GPU cannot be reached so, RendezvousError when a device does not come."""
    if lanes_fd is None:
        return None
    try:
        layout = LinkLayout(deployment.max_step_tokens, max_row_bytes)
        make = GPU_LINKS[deployment.gpu_links]
        links = make(
            deployment, device, layout, driver, resources=resources, timeout=_MEETING_SECONDS
        )
        host = None
        if deployment.loop == "host":
            host = SharedMemoryTransport(lanes_fd, deployment, device, on_gpu=links)
        return GPUPeers(links, host)
    finally:
        os.close(lanes_fd)
