"""Links in NVSHMEM's symmetric memory, and the start of NVSHMEM over our control path.

The first device of the deployment makes NVSHMEM's unique id (128 bytes) and tells it to the others
at a meeting in the runtime folder (:mod:`crosspool.transport.rendezvous`); then all initialise with
it, without MPI or NVSHMEM's own launcher. A device's processing element (PE) is its place among the
deployment's devices. The library is native code (crosspool/kernels/nvshmem.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.config.gpu import check_loop
from crosspool.kernels.nvshmem import UNIQUE_ID_BYTES, LinkEnd, Nvshmem, device_ends
from crosspool.transport.device_links import DeviceLinks, Tail, linked_ffn_ranks, links_bytes
from crosspool.transport.lane_layout import LinkLayout, LinkPlace
from crosspool.transport.rendezvous import RendezvousError, exchange

if TYPE_CHECKING:
    from crosspool.kernels.cuda_driver import CudaDriver
    from crosspool.kernels.dlpack import DLPackDevice
    from crosspool.transport.kept_descriptors import KeptDescriptors

ENVIRONMENT = {"NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo", "NVSHMEM_CUMEM_GRANULARITY": str(2 << 20)}
"""Settings for NVSHMEM on one host: its bootstrap stays on the loopback interface, and its heap
grows in steps of 2 MiB, not of 512 MiB."""
_MEETING = "nvshmem"


def join(
    deployment: Deployment,
    device: Device,
    layout: LinkLayout,
    driver: CudaDriver,
    kept: KeptDescriptors,
    *,
    resources: contextlib.ExitStack,
    timeout: float = 60.0,
) -> SymmetricLinks:
    """Makes the device's links to all others of the deployment; every device process calls this.
    Their memory stays until the process ends, ``kept`` has none of it: giving it back would need
    all processes at once.

    Raises ConfigError where NVSHMEM is missing or the loop cannot use it, RendezvousError when a
    device does not come within ``timeout`` seconds, RuntimeError when symmetric memory has no
    room."""
    check_loop(deployment)
    os.environ.update(ENVIRONMENT)
    try:
        library = Nvshmem()
    except ImportError as error:
        raise ConfigError(f"gpu_links: {error}") from error
    initialise(library, deployment, device, timeout)
    return links(library, deployment, device, layout, driver.dlpack_device)


def initialise(
    library: Nvshmem, deployment: Deployment, device: Device, timeout: float = 60.0
) -> int:
    """Initialises NVSHMEM among all devices of the deployment; returns this device's PE. Every
    device process calls this.

    Raises RendezvousError when a device does not come within ``timeout`` seconds. NVSHMEM's own
    initialisation has no bound; the launcher ends a process that does not become ready."""
    members = [member.name for member in deployment.devices]
    pe = members.index(device.name)
    mine = library.unique_id() if pe == 0 else b""
    meeting = Path(deployment.runtime_dir) / _MEETING
    unique_id = exchange(meeting, device.name, members, mine, timeout)[members[0]]
    if len(unique_id) != UNIQUE_ID_BYTES:
        raise RendezvousError(
            f"{members[0]} told an NVSHMEM id of {len(unique_id)} bytes, not {UNIQUE_ID_BYTES}"
        )
    library.init(pe, len(members), unique_id)
    return pe


@dataclass(frozen=True)
class SymmetricLinks(DeviceLinks):
    """The links of one device in symmetric memory: each end has a whole one at the same symmetric
    address, and kernels carry what it has written into the other end's
    (sgl-kernel-ext/cuda/nvshmem.h)."""

    library: Nvshmem

    def attention_end(self, lane: int, ffn_rank: int) -> tuple[LinkPlace, int]:
        """Returns this device's attention rank's end of a lane, and the PE of the other end.

        Raises ValueError when there is no such link."""
        peer = self.deployment.weight_pool_devices[ffn_rank]
        return self.attention_place(lane, ffn_rank), self.deployment.devices.index(peer)

    def ffn_end(self, attention_rank: int, lane: int) -> tuple[LinkPlace, int]:
        """Returns this device's FFN rank's end of a lane, as :meth:`attention_end` does."""
        peer = self.deployment.kv_pool_devices[attention_rank]
        return self.ffn_place(attention_rank, lane), self.deployment.devices.index(peer)

    def dispatch_tail(
        self,
        lane: int,
        ffn_ranks: Sequence[int],
        *,
        words: int,
        epoch: int,
        model: int,
        row_bytes: int,
    ) -> Tail:
        found = [self.attention_end(lane, rank) for rank in ffn_ranks]
        ends = [LinkEnd(place.address, peer, 0) for place, peer in found]

        def tail(stream: int) -> None:
            for end in ends:
                self.library.capture_dispatch(
                    end, words=words, epoch=epoch, model=model, row_bytes=row_bytes, stream=stream
                )

        return tail

    def reply_tail(self, links: Sequence[tuple[int, int]], *, words: int) -> Tail:
        import torch

        from crosspool.kernels.dlpack import DLPACK_CPU

        found = [self.ffn_end(*link) for link in links]
        raw = bytearray(device_ends([place.address for place, _ in found], [pe for _, pe in found]))
        on = "cpu" if self.memory.kind == DLPACK_CPU else f"cuda:{self.memory.ordinal}"
        ends = torch.frombuffer(raw, dtype=torch.uint8).to(on)

        def tail(stream: int) -> None:
            self.library.capture_reply(ends.data_ptr(), self.layout.payload_bytes, words, stream)

        return tail


def links(
    library: Nvshmem,
    deployment: Deployment,
    device: Device,
    layout: LinkLayout,
    memory: DLPackDevice,
) -> SymmetricLinks:
    """Makes the device's links; every device process calls this after :func:`initialise`. They are
    valid until the library is finalised. ``memory``: device of tensors over this device's ends.

    Raises RuntimeError when symmetric memory has no room."""
    sizes = [
        links_bytes(deployment, layout, rank) for rank in range(len(deployment.weight_pool_devices))
    ]
    address = library.allocate(sum(sizes))
    bases = {rank: address + sum(sizes[:rank]) for rank in linked_ffn_ranks(deployment, device)}
    return SymmetricLinks(deployment, device, layout, bases, memory, library)
