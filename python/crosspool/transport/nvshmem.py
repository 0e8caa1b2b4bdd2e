"""Start of NVSHMEM over our control path, and links in its symmetric memory.

The first device of the deployment makes NVSHMEM's unique id (128 bytes), tells it to the others at
a meeting in the runtime folder (:mod:`crosspool.transport.rendezvous`), and all initialise with it:
no MPI, no launcher of NVSHMEM's. A device is the processing element (PE) of its place among the
deployment's devices. The library itself is native code, linked with NVSHMEM's device part
(crosspool/kernels/nvshmem.py); :class:`NvshmemLibrary` is what is asked of it here.

Making and telling the id has run with NVSHMEM's own library, on a machine without a GPU. The rest
has not run on GPUs so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.transport.device_links import DeviceLinks, linked_ffn_ranks, links_bytes
from crosspool.transport.lane_layout import LinkLayout, LinkPlace
from crosspool.transport.rendezvous import Brought, RendezvousError, exchange

if TYPE_CHECKING:
    from crosspool.kernels.dlpack import DLPackDevice

UNIQUE_ID_BYTES = 128
"""sizeof(nvshmemx_uniqueid_t)."""
ENVIRONMENT = {"NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo", "NVSHMEM_CUMEM_GRANULARITY": str(2 << 20)}
"""Of every device process on one host: its bootstrap stays on the loopback interface, and its heap
grows by less than the 512 MiB of the default."""
_MEETING = "nvshmem"


class NvshmemLibrary(Protocol):
    """NVSHMEM in one process, on the process's current GPU. Every call raises RuntimeError when
    NVSHMEM refuses."""

    def unique_id(self) -> bytes:
        """nvshmemx_get_uniqueid: 128 bytes, made by PE 0 alone."""
        ...

    def init(self, pe: int, pes: int, unique_id: bytes) -> None:
        """nvshmemx_init_attr with the id: returns when all PEs have come."""
        ...

    def allocate(self, nbytes: int) -> int:
        """nvshmem_calloc, by all PEs together: the address of zeros in symmetric memory."""
        ...


def initialise(
    library: NvshmemLibrary, deployment: Deployment, device: Device, timeout: float = 60.0
) -> int:
    """Initialises NVSHMEM among all devices of the deployment; returns this device's PE. Every
    device process calls this.

    Raises RendezvousError when a device does not come within ``timeout`` seconds. Within NVSHMEM's
    own initialisation no bound of ours holds; the launcher ends what does not become ready."""
    members = [member.name for member in deployment.devices]
    pe = members.index(device.name)
    mine = Brought(library.unique_id() if pe == 0 else b"")
    meeting = Path(deployment.runtime_dir) / _MEETING
    with exchange(meeting, device.name, members, mine, timeout) as found:
        unique_id = found[members[0]].payload
    if len(unique_id) != UNIQUE_ID_BYTES:
        raise RendezvousError(
            f"{members[0]} told an NVSHMEM id of {len(unique_id)} bytes, not {UNIQUE_ID_BYTES}"
        )
    library.init(pe, len(members), unique_id)
    return pe


@dataclass(frozen=True)
class SymmetricLinks:
    """The links of one device in symmetric memory: each end has a whole one at the same symmetric
    address, and carries what it has written into the other end's (sgl-kernel-ext/cuda/nvshmem.h).
    """

    ends: DeviceLinks

    def attention_end(self, lane: int, ffn_rank: int) -> tuple[LinkPlace, int]:
        """This device's attention rank's end of a lane, and the PE of the other end.

        Raises ValueError when there is no such link."""
        deployment = self.ends.deployment
        peer = deployment.weight_pool_devices[ffn_rank]
        return self.ends.attention_place(lane, ffn_rank), deployment.devices.index(peer)

    def ffn_end(self, attention_rank: int, lane: int) -> tuple[LinkPlace, int]:
        """This device's FFN rank's end of a lane, as :meth:`attention_end`."""
        deployment = self.ends.deployment
        peer = deployment.kv_pool_devices[attention_rank]
        return self.ends.ffn_place(attention_rank, lane), deployment.devices.index(peer)


def links(
    library: NvshmemLibrary,
    deployment: Deployment,
    device: Device,
    layout: LinkLayout,
    memory: DLPackDevice,
) -> SymmetricLinks:
    """The device's links; every device process calls this after :func:`initialise`. They are good
    until the library is finalised. ``memory``: where tensors over this device's ends lie.

    Raises RuntimeError when symmetric memory has no room."""
    sizes = [
        links_bytes(deployment, layout, rank) for rank in range(len(deployment.weight_pool_devices))
    ]
    address = library.allocate(sum(sizes))
    bases = {rank: address + sum(sizes[:rank]) for rank in linked_ffn_ranks(deployment, device)}
    return SymmetricLinks(DeviceLinks(deployment, device, layout, bases, memory))
