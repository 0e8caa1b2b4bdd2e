"""GPU memory that the device processes of one host share. Each process exports its memory as a file
descriptor, and its peers map it; loads and stores then go straight to the peer's GPU, over NVLink
or PCIe.

The launcher keeps the descriptors (:mod:`crosspool.transport.kept_descriptors`), so the memory
outlives the process that made it. The process that takes its place maps the same memory with all
that its peers have written there meanwhile, and they go on with the addresses that they have.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.transport.device_links import DeviceLinks, linked_ffn_ranks, links_bytes
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.lane_layout import LinkLayout, round_up
from crosspool.transport.rendezvous import RendezvousError

if TYPE_CHECKING:
    from crosspool.kernels.cuda_driver import CudaDriver


@dataclass(frozen=True)
class Share:
    """The memory of one member."""

    place: int
    """Where its descriptor is kept."""
    nbytes: int
    """At least so many bytes, in units of the driver's."""


class PeerMemory:
    """Memory on this device, zeroed when it was made, and the memory of its peers, all mapped
    here."""

    def __init__(
        self,
        driver: CudaDriver,
        kept: KeptDescriptors,
        me: str,
        shares: Mapping[str, Share],
        *,
        timeout: float = 60.0,
    ) -> None:
        """Maps every member's share. That of ``me``, if there is one, is made unless an earlier
        process of this member has made it. Several members may use one GPU.

        Raises ConfigError when a peer's memory cannot be reached from this GPU, RendezvousError
        when a peer does not make its own within ``timeout`` seconds, CudaError otherwise."""
        self.addresses: dict[str, int] = {}
        """Address on this device of the first byte of each member's memory."""
        self._driver = driver
        self._kept = kept
        self._resources = contextlib.ExitStack()
        deadline = time.monotonic() + timeout
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            for name in sorted(shares, key=lambda name: name != me):  # a peer may wait for ours
                left = 0.0 if name == me else deadline - time.monotonic()
                found = self._find(name, shares[name], left)
                if found is not None:
                    self.addresses[name] = self._import(name, *found)
                elif name == me:
                    self.addresses[name] = self._make(shares[name])
                else:
                    raise RendezvousError(f"{name} did not make the memory of its links in time")
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

    def _make(self, share: Share) -> int:
        driver, nbytes = self._driver, round_up(share.nbytes, self._driver.granularity)
        handle = driver.create(nbytes)
        self._resources.callback(driver.release, handle)
        address = self._map(handle, nbytes)
        self._zero(address, nbytes)
        descriptor = driver.export(handle)
        try:
            self._kept.keep(share.place, descriptor, nbytes)
        finally:
            os.close(descriptor)
        return address

    def _find(self, name: str, share: Share, timeout: float) -> tuple[int, int] | None:
        """Returns descriptor and bytes of memory that is there. Raises RendezvousError when it is
        not the member's."""
        found = self._kept.find(share.place, timeout)
        if found is not None and found[1] < share.nbytes:
            os.close(found[0])
            raise RendezvousError(f"{name} has {found[1]} bytes for its links, not {share.nbytes}")
        return found

    def _import(self, name: str, descriptor: int, nbytes: int) -> int:
        from crosspool.kernels.cuda_driver import CudaError

        try:
            handle = self._driver.import_descriptor(descriptor)
            self._resources.callback(self._driver.release, handle)
            return self._map(handle, nbytes)
        except CudaError as error:
            raise ConfigError(
                f"kv_pool_devices, weight_pool_devices: {self._driver.name} cannot reach memory of"
                f" {name} ({error}): choose GPUs with peer access to each other, or"
                " gpu_links: nvshmem"
            ) from error
        finally:
            os.close(descriptor)

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
    kept: KeptDescriptors,
    *,
    resources: contextlib.ExitStack,
    timeout: float = 60.0,
) -> DeviceLinks:
    """Makes the device's links to all others of the deployment, on one host; every device process
    calls this. Their memory is unmapped with ``resources``. ``kept`` has a place for each device,
    in the order of ``deployment.devices``. Raises as :class:`PeerMemory` does."""
    ranks = {
        deployment.weight_pool_devices[rank]: rank for rank in linked_ffn_ranks(deployment, device)
    }
    shares = {
        other.name: Share(place, links_bytes(deployment, layout, ranks[other]))
        for place, other in enumerate(deployment.devices)
        if other in ranks
    }
    memory = PeerMemory(driver, kept, device.name, shares, timeout=timeout)
    resources.callback(memory.close)
    bases = {rank: memory.addresses[other.name] for other, rank in ranks.items()}
    return DeviceLinks(deployment, device, layout, bases, driver.dlpack_device)
