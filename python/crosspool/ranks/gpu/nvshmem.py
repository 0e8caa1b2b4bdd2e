"""Links in NVSHMEM's symmetric memory as the lanes of a GPU use them: behind the stages that write
a payload comes a kernel that carries it, its header and its signal to the other end's copy.

Has not run on GPUs yet (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from crosspool.kernels.nvshmem import LinkEnd, device_ends
from crosspool.ranks.gpu.scratch import LaneBuffers

if TYPE_CHECKING:
    from crosspool.transport.nvshmem import SymmetricLinks

Tail = Callable[[int], None]
"""What ends a captured stage; takes the stream under capture."""


class Carries(Protocol):
    """The kernels of :class:`crosspool.kernels.nvshmem.Nvshmem`."""

    def capture_dispatch(
        self, end: LinkEnd, *, words: int, epoch: int, model: int, row_bytes: int, stream: int
    ) -> None: ...

    def capture_reply(self, ends: int, payload_bytes: int, words: int, stream: int) -> None: ...


class Carrier:
    """One GPU's ends of its links, each a copy of its own, and the kernels between them."""

    def __init__(self, library: Carries, links: SymmetricLinks) -> None:
        self._library = library
        self._links = links

    def dispatch(
        self,
        lane: LaneBuffers,
        number: int,
        ffn_ranks: Sequence[int],
        *,
        epoch: int,
        model: int,
        row_bytes: int,
    ) -> Tail:
        """Behind ``DISPATCH``: to each of ``ffn_ranks``. ``number``: the lane's, among the
        attention rank's; ``epoch``: the loop's."""
        ends = []
        for rank in ffn_ranks:
            place, peer = self._links.attention_end(number, rank)
            ends.append(LinkEnd(place.address, peer, 0))
        words = lane.words.data_ptr()

        def tail(stream: int) -> None:
            for end in ends:
                self._library.capture_dispatch(
                    end, words=words, epoch=epoch, model=model, row_bytes=row_bytes, stream=stream
                )

        return tail

    def answer(self, lane: LaneBuffers, links: Sequence[tuple[int, int]]) -> Tail:
        """Behind the FFN stages of a lane that serves ``links``: (attention rank, lane) each."""
        found = [self._links.ffn_end(*link) for link in links]
        raw = bytearray(device_ends([place.address for place, _ in found], [pe for _, pe in found]))
        ends = torch.frombuffer(raw, dtype=torch.uint8).to(lane.device)
        payload_bytes, words = found[0][0].payload_bytes, lane.words.data_ptr()

        def tail(stream: int) -> None:
            self._library.capture_reply(ends.data_ptr(), payload_bytes, words, stream)

        return tail
