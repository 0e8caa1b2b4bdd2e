"""Links between devices of different hosts: the memory of :mod:`crosspool.transport.shared_memory`
once at each end, joined by a TCP connection for each link (``sgl-kernel-ext/cpu/links/``).

The ends are those of shared memory, with the same numbers, epochs and order of publication. What
wakes a peer there sends to it here; before an end looks at its peer's signal, it takes what has
come.
"""

from __future__ import annotations

import ctypes
import mmap

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels import network
from crosspool.kernels.network import Connection, Network
from crosspool.transport.connector import Connector, Peers
from crosspool.transport.data_path import (
    AttentionLink,
    DispatchHeader,
    FFNLink,
    between_hosts,
    spin_ns_of,
)
from crosspool.transport.handshake import LinkName
from crosspool.transport.lane_layout import PAGE_BYTES, LinkLayout, LinkPlace
from crosspool.transport.shared_links import (
    SegmentLink,
    SharedMemoryAttentionLink,
    SharedMemoryFFNLink,
)
from crosspool.transport.shared_memory import SharedMemoryTransport


class NetworkAttentionLink(SharedMemoryAttentionLink):
    """The :class:`~crosspool.transport.data_path.AttentionLink` to another host."""

    def __init__(self, link: SegmentLink, connection: Connection) -> None:
        super().__init__(link, connection)
        self._connection = connection

    @property
    def free(self) -> bool:
        self._connection.progress()
        return super().free

    def ready(self) -> bool:
        self._connection.progress()
        return super().ready()


class NetworkFFNLink(SharedMemoryFFNLink):
    """The :class:`~crosspool.transport.data_path.FFNLink` from another host."""

    def __init__(self, link: SegmentLink, connection: Connection) -> None:
        super().__init__(link, connection)
        self._connection = connection

    def poll(self) -> DispatchHeader | None:
        self._connection.progress()
        return super().poll()


class NetworkTransport:
    """One device's ends of its links to other devices, of which some are on other hosts: an
    :class:`~crosspool.transport.links.Interconnect`."""

    def __init__(
        self,
        deployment: Deployment,
        device: Device,
        peers: Peers,
        *,
        on_this_host: SharedMemoryTransport | None = None,
        spin_ns: int | None = None,
    ) -> None:
        """``on_this_host``: the ends of links to devices of this host, if there are any.
        ``spin_ns``: longest spin of :meth:`wait`; None: as
        :func:`~crosspool.transport.data_path.spin_ns_of` says.

        Raises OSError when the system refuses memory or a thread; ValueError when an FFN rank's
        device has no listener, the sizes contradict the deployment, or a peer has no address."""
        credentials = peers.credentials
        if credentials.max_rows != deployment.max_step_tokens:
            raise ValueError(
                f"max_rows is {credentials.max_rows}: steps have {deployment.max_step_tokens} rows"
            )
        self._deployment, self._device = deployment, device
        self._on_this_host = on_this_host
        self._layout = LinkLayout(credentials.max_rows, credentials.max_row_bytes)
        self._links = _links_of(deployment, device)
        served = {name for name in self._links if self._serves(name)}
        if served and peers.listener is None:
            raise ValueError(
                f"{device.name} has no listener, and other hosts' links to it need one"
            )
        reached = {name: self._ffn_device(name) for name in self._links if name not in served}
        if missing := set(reached.values()) - peers.addresses.keys():
            raise ValueError(f"{', '.join(sorted(missing))}: no address is known")
        self._memory = mmap.mmap(-1, PAGE_BYTES + len(self._links) * self._layout.link_bytes)
        self._base = ctypes.addressof(ctypes.c_uint8.from_buffer(self._memory))
        self._doorbell = self._base if on_this_host is None else on_this_host.doorbell_address
        self._spin_ns = spin_ns_of(deployment, device) if spin_ns is None else spin_ns
        self._network = Network(self._doorbell)
        self._connections = {
            name: self._network.add(
                self._base + self._offset(name),
                self._layout.payload_bytes,
                max_rows=self._layout.max_rows,
                max_row_bytes=self._layout.max_row_bytes,
                end=network.FFN if name in served else network.ATTENTION,
            )
            for name in self._links
        }
        self._connector = Connector(
            self._network,
            peers,
            {name: (self._connections[name], peer) for name, peer in reached.items()},
            {name: self._connections[name] for name in served},
        )

    def attention_link(self, lane: int, ffn_rank: int) -> AttentionLink:
        """This device's attention rank's end of a lane to an FFN rank on another device.

        Raises ValueError when there is no such link."""
        peer = self._deployment.weight_pool_devices[ffn_rank]
        if peer.node == self._device.node:
            return self._beside(peer).attention_link(lane, ffn_rank)
        name = LinkName(self._rank(), lane, ffn_rank)
        return NetworkAttentionLink(self._segment_link(name), self._connection(name))

    def ffn_link(self, attention_rank: int, lane: int) -> FFNLink:
        """This device's FFN rank's end of a lane of an attention rank on another device.

        Raises ValueError when there is no such link."""
        peer = self._deployment.kv_pool_devices[attention_rank]
        if peer.node == self._device.node:
            return self._beside(peer).ffn_link(attention_rank, lane)
        name = LinkName(attention_rank, lane, self._ffn_rank())
        return NetworkFFNLink(self._segment_link(name), self._connection(name))

    def attention_place(self, lane: int, ffn_rank: int) -> LinkPlace:
        """Where the link of :meth:`attention_link` lies, for native code. Raises ValueError."""
        peer = self._deployment.weight_pool_devices[ffn_rank]
        if peer.node == self._device.node:
            return self._beside(peer).attention_place(lane, ffn_rank)
        return self._place(LinkName(self._rank(), lane, ffn_rank))

    def ffn_place(self, attention_rank: int, lane: int) -> LinkPlace:
        """Where the link of :meth:`ffn_link` lies, for native code. Raises ValueError."""
        peer = self._deployment.kv_pool_devices[attention_rank]
        if peer.node == self._device.node:
            return self._beside(peer).ffn_place(attention_rank, lane)
        return self._place(LinkName(attention_rank, lane, self._ffn_rank()))

    @property
    def max_row_bytes(self) -> int:
        """Bytes of the widest row that every link has room for."""
        beside = self._on_this_host
        own = self._layout.max_row_bytes
        return own if beside is None else min(own, beside.max_row_bytes)

    @property
    def doorbell_address(self) -> int:
        """Address of this device's doorbell. The memory is mapped as long as the transport is."""
        return self._doorbell

    @property
    def network_address(self) -> int:
        """Address of the native network, with which native loops wait."""
        return self._network.address

    def wait(self, timeout: float) -> bool:
        """Sleeps until something has come from a peer, at most ``timeout`` seconds; returns whether
        something may have."""
        return self._network.wait(self._spin_ns, int(timeout * 1e9))

    def close(self) -> None:
        """Ends all connections. No loop may use the links any more."""
        self._connector.close()
        self._network.close()

    def _place(self, name: LinkName) -> LinkPlace:
        connection = self._connection(name)
        return LinkPlace(
            address=self._base + self._offset(name),
            payload_bytes=self._layout.payload_bytes,
            max_rows=self._layout.max_rows,
            max_row_bytes=self._layout.max_row_bytes,
            peer_doorbell=0,
            connection=connection.address,
        )

    def _segment_link(self, name: LinkName) -> SegmentLink:
        self._connection(name)
        link = name.attention_rank, name.lane, name.ffn_rank
        return SegmentLink(self._memory, self._offset(name), self._layout, link, None)

    def _connection(self, name: LinkName) -> Connection:
        if name not in self._connections:
            raise ValueError(f"{self._device.name} has no link of {name} to another host")
        return self._connections[name]

    def _offset(self, name: LinkName) -> int:
        return PAGE_BYTES + self._links.index(name) * self._layout.link_bytes

    def _ffn_device(self, name: LinkName) -> str:
        return self._deployment.weight_pool_devices[name.ffn_rank].name

    def _serves(self, name: LinkName) -> bool:
        return self._ffn_device(name) == self._device.name

    def _beside(self, peer: Device) -> SharedMemoryTransport:
        if self._on_this_host is None:
            raise ValueError(f"{self._device.name} has no memory with {peer.name}: pass --lanes-fd")
        return self._on_this_host

    def _rank(self) -> int:
        return self._deployment.kv_pool_devices.index(self._device)

    def _ffn_rank(self) -> int:
        return self._deployment.weight_pool_devices.index(self._device)


def _links_of(deployment: Deployment, device: Device) -> list[LinkName]:
    """The links of a device to devices of other hosts."""
    kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
    return [
        LinkName(attention_rank, lane, ffn_rank)
        for attention_rank, ffn_rank in between_hosts(deployment)
        if device in (kv_pool[attention_rank], weight_pool[ffn_rank])
        for lane in range(deployment.lanes)
    ]
