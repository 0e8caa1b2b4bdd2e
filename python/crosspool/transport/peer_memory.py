"""GPU memory that the device processes of one host share. Each process exports its memory as a file
descriptor and maps what its peers exported; loads and stores then go straight to the peer's GPU,
over NVLink or PCIe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.transport.device_links import DeviceLinks, linked_ffn_ranks, links_bytes
from crosspool.transport.lane_layout import LinkLayout, round_up
from crosspool.transport.rendezvous import Brought, RendezvousError, exchange

if TYPE_CHECKING:
    from crosspool.kernels.cuda_driver import CudaDriver

_MEETING = "lane-memory"


class PeerMemory:
    """Zeroed memory on this device, and the memory of its peers, all mapped here."""

    def __init__(
        self,
        driver: CudaDriver,
        meeting: Path,
        me: str,
        members: Sequence[str],
        *,
        own_bytes: int,
        timeout: float = 60.0,
    ) -> None:
        """Makes ``own_bytes`` of memory (rounded up; 0: none), and meets the other ``members`` at
        the socket ``meeting``. Several members may use one GPU.

        Raises ConfigError when a peer's memory cannot be reached from this GPU, RendezvousError
        when a member does not come within ``timeout`` seconds, CudaError otherwise."""
        self.addresses: dict[str, int] = {}
        """Address on this device of the first byte of each member that has memory."""
        self._driver = driver
        self._resources = contextlib.ExitStack()
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            mine = Brought()
            failed.callback(mine.close)
            if own_bytes:
                nbytes = round_up(own_bytes, driver.granularity)
                handle = driver.create(nbytes)
                self._resources.callback(driver.release, handle)
                self.addresses[me] = self._map(handle, nbytes)
                self._zero(self.addresses[me], nbytes)
                mine.descriptors.append(driver.export(handle))
                mine.payload = nbytes.to_bytes(8, "little")
            with exchange(meeting, me, members, mine, timeout) as found:
                for name, brought in found.items():
                    if name != me and brought.payload:
                        self.addresses[name] = self._import(name, brought)
            mine.close()
            failed.pop_all()

    def close(self) -> None:
        """Unmaps everything. What peers have mapped stays until they close, too."""
        self.addresses = {}
        self._resources.close()

    def _map(self, handle: int, nbytes: int) -> int:
        from crosspool.kernels.cuda_driver import allow_access

        driver, resources = self._driver, self._resources
        address = driver.reserve(nbytes)
        resources.callback(driver.free_reservation, address, nbytes)
        driver.map(address, nbytes, handle)
        resources.callback(driver.unmap, address, nbytes)
        allow_access(driver, address, nbytes)
        return address

    def _import(self, name: str, brought: Brought) -> int:
        from crosspool.kernels.cuda_driver import CudaError

        if len(brought.descriptors) != 1 or len(brought.payload) != 8:
            raise RendezvousError(f"{name} sent no memory handle to map")
        nbytes = int.from_bytes(brought.payload, "little")
        try:
            handle = self._driver.import_descriptor(brought.descriptors[0])
            self._resources.callback(self._driver.release, handle)
            return self._map(handle, nbytes)
        except CudaError as error:
            raise ConfigError(
                f"kv_pool_devices, weight_pool_devices: {self._driver.name} cannot reach memory of"
                f" {name} ({error}): choose GPUs with peer access to each other, or"
                " gpu_links: nvshmem"
            ) from error

    def _zero(self, address: int, nbytes: int) -> None:
        import torch

        from crosspool.kernels.dlpack import DLPACK_CUDA, tensor_at

        device = self._driver.dlpack_device
        tensor_at(address, (nbytes,), torch.uint8, device).zero_()
        if device.kind == DLPACK_CUDA:
            torch.cuda.current_stream(device.ordinal).synchronize()


def join(
    deployment: Deployment,
    device: Device,
    layout: LinkLayout,
    driver: CudaDriver,
    *,
    resources: contextlib.ExitStack,
    timeout: float = 60.0,
) -> DeviceLinks:
    """Makes the device's links to all others of the deployment, on one host; every device process
    calls this. Their memory is unmapped with ``resources``. Raises as :class:`PeerMemory` does."""
    own = [rank for rank, other in enumerate(deployment.weight_pool_devices) if other == device]
    memory = PeerMemory(
        driver,
        Path(deployment.runtime_dir) / _MEETING,
        device.name,
        [member.name for member in deployment.devices],
        own_bytes=sum(links_bytes(deployment, layout, rank) for rank in own),
        timeout=timeout,
    )
    resources.callback(memory.close)
    bases = {
        rank: memory.addresses[deployment.weight_pool_devices[rank].name]
        for rank in linked_ffn_ranks(deployment, device)
    }
    return DeviceLinks(deployment, device, layout, bases, driver.dlpack_device)
