"""What a host-launched loop does with other devices: it tells them, and hears from them, in the
host's memory; payloads are written by the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from crosspool.transport.data_path import DispatchHeader

if TYPE_CHECKING:
    from crosspool.ranks.executor import PeerDoorbell


class DispatchEnd(Protocol):
    """The attention rank's end of a link whose payloads device code writes and reads: see
    :class:`~crosspool.transport.shared_links.SharedMemoryAttentionLink`."""

    @property
    def free(self) -> bool: ...

    def announce(self, header: DispatchHeader, row_bytes: int) -> None: ...

    def ready(self) -> bool: ...

    def accept(self) -> None: ...


class ReplyEnd(Protocol):
    """The FFN rank's end, as :class:`~crosspool.transport.shared_links.SharedMemoryFFNLink`."""

    attention_rank: int
    lane: int

    def poll(self) -> DispatchHeader | None: ...

    @property
    def row_bytes(self) -> int: ...

    def answer(self) -> None: ...


@dataclass(frozen=True)
class HostExchange:
    """What the host-launched loop does with other devices: it tells them, and hears from them, in
    the host's memory, when the device has written a payload."""

    doorbell: PeerDoorbell
    outgoing: Sequence[Sequence[DispatchEnd]] = ()
    """By lane and link, of the attention rank."""
    served: Sequence[Sequence[ReplyEnd]] = ()
    """By lane and link, of the FFN rank, whose lanes come after the attention rank's."""
    held: frozenset[int] = frozenset()
    """Models of which the FFN rank holds a part."""
    bucket_rows: Sequence[int] = ()
