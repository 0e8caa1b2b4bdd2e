"""Start of NVSHMEM over our control path, and links in its symmetric memory.

The first device of the deployment makes NVSHMEM's unique id (128 bytes), tells it to the others at
a meeting in the runtime folder (:mod:`crosspool.transport.rendezvous`), and all initialise with it:
no MPI, no launcher of NVSHMEM's. A device is the processing element (PE) of its place among the
deployment's devices. The library itself is native code, linked with NVSHMEM's device part;
:class:`NvshmemLibrary` is what is asked of it.

Making and telling the id has run with NVSHMEM's own library, on a machine without a GPU. The rest
has not run on GPUs so far.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.transport.device_links import DeviceLinks, linked_ffn_ranks, links_bytes
from crosspool.transport.lane_layout import LinkLayout
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

    def pointer(self, address: int, pe: int) -> int:
        """nvshmem_ptr: where this PE's loads and stores reach the same object of another PE; 0:
        nowhere."""
        ...

    def finalize(self) -> None:
        """nvshmem_finalize, by all PEs together; frees what was allocated."""
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


def links(
    library: NvshmemLibrary,
    deployment: Deployment,
    device: Device,
    layout: LinkLayout,
    memory: DLPackDevice,
) -> DeviceLinks:
    """The device's links in symmetric memory; every device process calls this after
    :func:`initialise`. They are good until the library is finalised.

    Raises ConfigError when a peer's memory is out of reach for loads and stores."""
    pools = deployment.weight_pool_devices
    address = library.allocate(
        max(links_bytes(deployment, layout, rank) for rank in range(len(pools)))
    )
    bases = {}
    for rank in linked_ffn_ranks(deployment, device):
        reached = library.pointer(address, deployment.devices.index(pools[rank]))
        if reached == 0:
            raise ConfigError(
                f"kv_pool_devices, weight_pool_devices: {device.name} cannot reach memory of"
                f" {pools[rank].name}: choose GPUs with peer access to each other"
            )
        bases[rank] = reached
    return DeviceLinks(deployment, device, layout, bases, memory)
