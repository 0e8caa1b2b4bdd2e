"""The host-launched loop's seam to other devices. Device code writes and reads the payloads;
signals and headers lie in the host's memory, where the loop tells its peers and hears from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from crosspool.transport.data_path import DispatchHeader

if TYPE_CHECKING:
    from crosspool.ranks.executor import PeerDoorbell


class DispatchEnd(Protocol):
    """The attention rank's end of a link, without its payloads: see
    :class:`~crosspool.transport.shared_links.SharedMemoryAttentionLink`."""

    @property
    def free(self) -> bool: ...

    def announce(self, header: DispatchHeader, row_bytes: int) -> None: ...

    def ready(self) -> bool: ...

    def accept(self) -> None: ...


class ReplyEnd(Protocol):
    """The FFN rank's end of a link, without its payloads: see
    :class:`~crosspool.transport.shared_links.SharedMemoryFFNLink`."""

    attention_rank: int
    lane: int

    def poll(self) -> DispatchHeader | None: ...

    @property
    def row_bytes(self) -> int: ...

    def announce_reply(self) -> None: ...


@dataclass(frozen=True)
class HostExchange:
    """All that the host-launched loop needs of other devices."""

    doorbell: PeerDoorbell
    outgoing: Sequence[Sequence[DispatchEnd]] = ()
    """The attention rank's ends, indexed [lane][link]."""
    served: Sequence[Sequence[ReplyEnd]] = ()
    """The FFN rank's ends, indexed [lane][link]. Its lanes come after the attention rank's."""
    held: frozenset[int] = frozenset()
    """Indices of the models of which the FFN rank holds a part."""
    bucket_rows: Sequence[int] = ()
    """Rows of each bucket, ascending."""
