"""One end of a link between hosts, without the threads that connect it."""

from __future__ import annotations

import ctypes
import mmap
import socket

from crosspool.kernels import network
from crosspool.kernels.network import Connection, Network
from crosspool.transport.lane_layout import PAGE_BYTES, LinkLayout
from crosspool.transport.network_links import NetworkAttentionLink, NetworkFFNLink
from crosspool.transport.shared_links import SegmentLink


class End:
    """Memory of a link, all zero, and its connection."""

    def __init__(self, layout: LinkLayout, end: int) -> None:
        self.memory = mmap.mmap(-1, PAGE_BYTES + layout.link_bytes)
        base = ctypes.addressof(ctypes.c_uint8.from_buffer(self.memory))
        self.doorbell = base
        self.network = Network(base)
        self.connection: Connection = self.network.add(
            base + PAGE_BYTES,
            layout.payload_bytes,
            max_rows=layout.max_rows,
            max_row_bytes=layout.max_row_bytes,
            end=end,
        )
        self.segment = SegmentLink(self.memory, PAGE_BYTES, layout, (0, 0, 0), None)

    @property
    def signals(self) -> tuple[int, int]:
        """Numbers of the last dispatch and of the last reply."""
        return self.segment.dispatched.load(), self.segment.combined.load()

    def take(self, peer: socket.socket) -> None:
        """Takes a connected socket over."""
        self.connection.hand_over(peer.detach())

    def close(self) -> None:
        self.network.close()


class AttentionSide(End):
    def __init__(self, layout: LinkLayout) -> None:
        super().__init__(layout, network.ATTENTION)
        self.link = NetworkAttentionLink(self.segment, self.connection)


class FFNSide(End):
    def __init__(self, layout: LinkLayout) -> None:
        super().__init__(layout, network.FFN)
        self.link = NetworkFFNLink(self.segment, self.connection)
