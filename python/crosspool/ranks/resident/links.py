"""The links of a device as native code drives them."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels import engine_structs as es
from crosspool.transport.connector import Peers
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.lane_layout import LINE_BYTES, LinkPlace, round_up
from crosspool.transport.links import join, open_ends


@dataclass
class ResidentLink:
    """A link that native code drives, with the counters that it writes."""

    attention_rank: int
    lane: int
    ffn_rank: int
    _native: es.NativeLinkCounters

    @property
    def counters(self) -> LinkCounters:
        native = self._native
        return LinkCounters(
            native.dispatches, native.rows, native.dispatch_bytes, native.combine_bytes
        )


class ResidentLinks:
    """The links of one device's ranks, opened by :func:`crosspool.transport.links.open_ends` and
    described to native code, which may use them as long as this is there."""

    def __init__(
        self,
        deployment: Deployment,
        device: Device,
        lanes_fd: int | None,
        peers: Peers | None,
        resources: contextlib.ExitStack,
    ) -> None:
        """The last three are what :func:`crosspool.transport.links.join` takes."""
        kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
        self.attention_rank = kv_pool.index(device) if device in kv_pool else -1
        self.ffn_rank = weight_pool.index(device) if device in weight_pool else -1
        self._interconnect = join(deployment, device, lanes_fd, peers, resources=resources)
        self._local = (es.NativeLinkCounters * deployment.lanes)()
        self._outgoing: list[es.LinkDescription] = []
        self._incoming: list[es.LinkDescription] = []
        remote = None if self._interconnect is None else self
        self.attention, self.ffn = open_ends(
            deployment, device, local=self._local_link, remote=remote
        )
        # A device without peers rings for itself; its doorbell has a cache line of its own.
        self._alone = ctypes.create_string_buffer(2 * LINE_BYTES)

    @property
    def max_row_bytes(self) -> int | None:
        """Bytes of the widest row that a link has room for; None where there are no links."""
        return None if self._interconnect is None else self._interconnect.max_row_bytes

    def describe(self, description: es.LoopDescription) -> None:
        """Fills in links, counters, doorbell and ranks."""
        description.outgoing = (es.LinkDescription * len(self._outgoing))(*self._outgoing)
        description.incoming = (es.LinkDescription * len(self._incoming))(*self._incoming)
        description.outgoing_count = len(self._outgoing)
        description.incoming_count = len(self._incoming)
        description.attention_rank, description.ffn_rank = self.attention_rank, self.ffn_rank
        if self.attention_rank >= 0 and self.ffn_rank >= 0:
            description.local_counters = ctypes.addressof(self._local)
        if self._interconnect is None:
            description.doorbell = round_up(ctypes.addressof(self._alone), LINE_BYTES)
        else:
            description.doorbell = self._interconnect.doorbell_address
            description.network = self._interconnect.network_address

    def attention_link(self, lane: int, ffn_rank: int) -> ResidentLink:
        assert self._interconnect is not None
        link = ResidentLink(self.attention_rank, lane, ffn_rank, es.NativeLinkCounters())
        place = self._interconnect.attention_place(lane, ffn_rank)
        self._outgoing.append(_described(place, link))
        return link

    def ffn_link(self, attention_rank: int, lane: int) -> ResidentLink:
        assert self._interconnect is not None
        link = ResidentLink(attention_rank, lane, self.ffn_rank, es.NativeLinkCounters())
        place = self._interconnect.ffn_place(attention_rank, lane)
        self._incoming.append(_described(place, link))
        return link

    def _local_link(self, attention_rank: int, lane: int, ffn_rank: int) -> ResidentLink:
        return ResidentLink(attention_rank, lane, ffn_rank, self._local[lane])


def _described(place: LinkPlace, link: ResidentLink) -> es.LinkDescription:
    return es.LinkDescription(
        link=place.address,
        payload_bytes=place.payload_bytes,
        max_rows=place.max_rows,
        max_row_bytes=place.max_row_bytes,
        peer=place.peer_doorbell,
        counters=ctypes.addressof(link._native),
        connection=place.connection,
        attention_rank=link.attention_rank,
        lane=link.lane,
        ffn_rank=link.ffn_rank,
    )
