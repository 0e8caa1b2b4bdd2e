"""The links of a device as native code drives them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from crosspool.kernels import engine_structs as es
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.lane_layout import LinkPlace
from crosspool.transport.shared_memory import SharedMemoryTransport


@dataclass
class ResidentLink:
    """A link that native code drives, as far as its counters go."""

    attention_rank: int
    lane: int
    ffn_rank: int
    _native: es.LinkCounters

    @property
    def counters(self) -> LinkCounters:
        native = self._native
        return LinkCounters(
            native.dispatches, native.rows, native.dispatch_bytes, native.combine_bytes
        )


class ResidentLinks:
    """Opens links to other devices for :func:`crosspool.transport.links.open_ends`, and describes
    them to native code."""

    def __init__(
        self, transport: SharedMemoryTransport, attention_rank: int, ffn_rank: int
    ) -> None:
        """The device's ranks, -1 for one that it does not have."""
        self._transport = transport
        self._attention_rank = attention_rank
        self._ffn_rank = ffn_rank
        self.outgoing: list[es.LinkDescription] = []
        """Links of the attention rank to other devices."""
        self.incoming: list[es.LinkDescription] = []
        """Links of other devices to the FFN rank."""

    def attention_link(self, lane: int, ffn_rank: int) -> ResidentLink:
        place = self._transport.attention_place(lane, ffn_rank)
        link = ResidentLink(self._attention_rank, lane, ffn_rank, es.LinkCounters())
        self.outgoing.append(_described(place, link))
        return link

    def ffn_link(self, attention_rank: int, lane: int) -> ResidentLink:
        place = self._transport.ffn_place(attention_rank, lane)
        link = ResidentLink(attention_rank, lane, self._ffn_rank, es.LinkCounters())
        self.incoming.append(_described(place, link))
        return link


def _described(place: LinkPlace, link: ResidentLink) -> es.LinkDescription:
    return es.LinkDescription(
        link=place.address,
        payload_bytes=place.payload_bytes,
        max_rows=place.max_rows,
        max_row_bytes=place.max_row_bytes,
        peer=place.peer_doorbell,
        counters=ctypes.addressof(link._native),
        attention_rank=link.attention_rank,
        lane=link.lane,
        ffn_rank=link.ffn_rank,
    )
