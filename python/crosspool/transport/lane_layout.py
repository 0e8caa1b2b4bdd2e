"""The layout of a link in memory: ``Link`` of lanes.h, then the dispatch payload and the combine
payload."""

from __future__ import annotations

from dataclasses import dataclass

LINE_BYTES = 64
PAGE_BYTES = 4096
LINK_HEAD_BYTES = 256
"""Bytes of a link's signals and headers, before its payloads."""


def round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


@dataclass(frozen=True)
class LinkLayout:
    """The sizes of one deployment's links."""

    max_rows: int
    max_row_bytes: int
    """Hidden size times dtype bytes, of the model for which that is most."""

    @property
    def payload_bytes(self) -> int:
        """Room for each of the two payloads."""
        return round_up(self.max_rows * self.max_row_bytes, LINE_BYTES)

    @property
    def link_bytes(self) -> int:
        return round_up(LINK_HEAD_BYTES + 2 * self.payload_bytes, PAGE_BYTES)


@dataclass(frozen=True)
class LinkPlace:
    """Where native code finds a link, as addresses of this process."""

    address: int
    payload_bytes: int
    max_rows: int
    max_row_bytes: int
    peer_doorbell: int
    """Doorbell of the other end's device; 0: it polls."""
    connection: int = 0
    """Native connection to the other end's memory, on another host; 0: the memory is shared."""
