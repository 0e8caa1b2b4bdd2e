"""How the ranks of one GPU reach those on other GPUs of the host.

Has not run on GPUs yet (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.config.gpu import check_loop
from crosspool.kernels.cuda_driver import CudaDriver
from crosspool.models.spec import DTYPE_BYTES, ModelSpec
from crosspool.ranks.gpu.nvshmem import Carrier
from crosspool.transport import nvshmem, peer_memory
from crosspool.transport.data_path import remote_pairs
from crosspool.transport.device_links import DeviceLinks
from crosspool.transport.lane_layout import LinkLayout
from crosspool.transport.shared_memory import SharedMemoryTransport

_MEETING_SECONDS = 120.0
"""How long a device process waits for the others to be as far."""


@dataclass(frozen=True)
class Peers:
    """One GPU's end of the data path."""

    links: DeviceLinks
    transport: SharedMemoryTransport | None
    """With the host loop: signals, headers and doorbells in the host's memory."""
    carrier: Carrier | None = None
    """Where each end has a copy of the links."""


def layout_of(deployment: Deployment, specs: Sequence[ModelSpec]) -> LinkLayout:
    """The sizes of the deployment's links."""
    row_bytes = max(spec.hidden * DTYPE_BYTES[spec.dtype] for spec in specs)
    return LinkLayout(deployment.max_step_tokens, row_bytes)


def meet(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    lanes_fd: int | None,
    *,
    driver: CudaDriver,
    resources: contextlib.ExitStack,
) -> Peers | None:
    """Makes the memory of the device's links, together with the processes of all other devices;
    None when nothing leaves any device. Takes ``lanes_fd``.

    Raises ConfigError when a GPU cannot reach another's memory or NVSHMEM is missing,
    RendezvousError when a device does not come."""
    if not remote_pairs(deployment):
        return None
    layout = layout_of(deployment, specs)
    if deployment.gpu_links == "nvshmem":
        return _symmetric(deployment, device, layout, lanes_fd, driver)
    memory, links = peer_memory.join(driver, deployment, device, layout, _MEETING_SECONDS)
    resources.callback(memory.close)
    return Peers(links, join_host_memory(deployment, device, lanes_fd, links))


def _symmetric(
    deployment: Deployment,
    device: Device,
    layout: LinkLayout,
    lanes_fd: int | None,
    driver: CudaDriver,
) -> Peers:
    """Its memory is there until the process ends: giving it back would need all of them."""
    from crosspool.kernels.nvshmem import Nvshmem

    check_loop(deployment)
    if lanes_fd is not None:
        os.close(lanes_fd)
    os.environ.update(nvshmem.ENVIRONMENT)
    try:
        library = Nvshmem()
    except ImportError as error:
        raise ConfigError(f"gpu_links: {error}") from error
    nvshmem.initialise(library, deployment, device, _MEETING_SECONDS)
    links = nvshmem.links(library, deployment, device, layout, driver.dlpack_device)
    return Peers(links.ends, None, Carrier(library, links))


def join_host_memory(
    deployment: Deployment, device: Device, lanes_fd: int | None, links: DeviceLinks
) -> SharedMemoryTransport | None:
    """What a host loop needs beside the links; None for a resident one, which polls them. Takes
    ``lanes_fd``."""
    if lanes_fd is None:
        raise RuntimeError(f"device {device.name} has peers on other devices: pass --lanes-fd")
    try:
        if deployment.loop == "resident":
            return None
        return SharedMemoryTransport(lanes_fd, deployment, device, on_gpu=links)
    finally:
        os.close(lanes_fd)
