"""Both ends of a link in the segment of :mod:`crosspool.transport.shared_memory`, which says who
writes what, when."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from crosspool.kernels.native import Signal
from crosspool.transport.data_path import DispatchHeader, LaneError, LinkCounters, check_rows
from crosspool.transport.device_links import DeviceLinks
from crosspool.transport.lane_layout import LINK_HEAD_BYTES, LinkLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DISPATCH_HEADER = struct.Struct("<QIIII")
_COMBINE_HEADER = struct.Struct("<QII")
_DISPATCH_SIGNAL, _DISPATCH, _COMBINE_SIGNAL, _COMBINE = 0, 64, 128, 192


class Rings(Protocol):
    """Tells a peer that there is something new."""

    def ring(self) -> None: ...


class SegmentLink:
    """One link's part of the segment, seen from either end."""

    def __init__(
        self,
        memory: mmap.mmap,
        base: int,
        layout: LinkLayout,
        link: tuple[int, int, int],
        on_gpu: DeviceLinks | None,
    ) -> None:
        """``base``: offset of the link in the segment; ``link``: attention rank, lane, FFN rank;
        ``on_gpu``: the GPU memory that holds the payloads, if they are not in the segment."""
        import torch

        self.attention_rank, self.lane, self.ffn_rank = link
        self.memory = memory
        self.max_rows, self.max_row_bytes = layout.max_rows, layout.max_row_bytes
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        address = everything.data_ptr() + base
        self.dispatched = Signal(address + _DISPATCH_SIGNAL)
        self.combined = Signal(address + _COMBINE_SIGNAL)
        self.dispatch_header = base + _DISPATCH
        self.combine_header = base + _COMBINE
        self._on_gpu = on_gpu
        begin, payload = base + LINK_HEAD_BYTES, layout.payload_bytes
        payloads = everything[begin:] if on_gpu is None else on_gpu.payloads(*link)
        self.dispatch_payload = payloads[:payload]
        self.combine_payload = payloads[payload : 2 * payload]

    def error(self, what: str) -> LaneError:
        link = f"attention rank {self.attention_rank}, lane {self.lane}, FFN rank {self.ffn_rank}"
        return LaneError(f"{link}: {what}")

    def check_size(self, rows: int, row_bytes: int) -> None:
        if not (1 <= rows <= self.max_rows and 1 <= row_bytes <= self.max_row_bytes):
            raise self.error(
                f"{rows} rows of {row_bytes} bytes; between 1 and {self.max_rows} rows of at most"
                f" {self.max_row_bytes} bytes fit"
            )

    def view(self, payload: Tensor, rows: int, row_bytes: int, dtype: torch.dtype) -> Tensor:
        if row_bytes % dtype.itemsize:
            raise self.error(f"rows of {row_bytes} bytes are no whole rows of {dtype}")
        return payload[: rows * row_bytes].view(dtype).view(rows, row_bytes // dtype.itemsize)

    def fill(self, payload: Tensor, row_bytes: int, rows: Tensor) -> None:
        """Writes rows; when this returns, a peer may be told of them."""
        self.view(payload, len(rows), row_bytes, rows.dtype).copy_(rows)
        if self._on_gpu is not None:
            self._on_gpu.settle()


class _End:
    """Either end of a link."""

    def __init__(self, link: SegmentLink, peer: Rings) -> None:
        """``peer``: doorbell of the other end's device, or what stands for one."""
        self.attention_rank, self.lane, self.ffn_rank = (
            link.attention_rank,
            link.lane,
            link.ffn_rank,
        )
        self.counters = LinkCounters()
        self._link = link
        self._peer = peer
        self._row_bytes = 0


class SharedMemoryAttentionLink(_End):
    """The :class:`~crosspool.transport.data_path.AttentionLink` through the segment."""

    def __init__(self, link: SegmentLink, peer: Rings) -> None:
        super().__init__(link, peer)
        self._sequence = link.dispatched.load()
        self._outstanding: DispatchHeader | None = None

    @property
    def free(self) -> bool:
        """Whether a dispatch may be made and its payload written, because none is outstanding."""
        link = self._link
        return self._outstanding is None and link.combined.load() == link.dispatched.load()

    def dispatch(self, header: DispatchHeader, hidden: Tensor) -> None:
        link = self._link
        self._check_free()
        check_rows(header, hidden)
        row_bytes = hidden.shape[1] * hidden.itemsize
        link.check_size(header.rows, row_bytes)
        link.fill(link.dispatch_payload, row_bytes, hidden)
        self.announce(header, row_bytes)

    def announce(self, header: DispatchHeader, row_bytes: int) -> None:
        """Publishes rows that device code has written into the payload while the link was
        :attr:`free`. Raises LaneError as :meth:`dispatch` does."""
        link = self._link
        self._check_free()
        link.check_size(header.rows, row_bytes)
        _DISPATCH_HEADER.pack_into(
            link.memory,
            link.dispatch_header,
            header.epoch,
            header.model,
            header.layer,
            header.rows,
            row_bytes,
        )
        # Not this end's own count: a peer's numbers may have come since.
        self._sequence = link.dispatched.load() + 1
        self._outstanding, self._row_bytes = header, row_bytes
        link.dispatched.store(self._sequence)
        self._peer.ring()
        self.counters.dispatches += 1
        self.counters.rows += header.rows
        self.counters.dispatch_bytes += header.rows * row_bytes

    def ready(self) -> bool:
        return self._outstanding is not None and self._link.combined.load() == self._sequence

    def combine(self, out_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        link, header = self._link, self._replied_to()
        partial = link.view(link.combine_payload, header.rows, self._row_bytes, dtype)
        if partial.shape != tuple(out_shape):
            raise link.error(f"the partial sum is {tuple(partial.shape)}, not {tuple(out_shape)}")
        self.accept()
        return partial

    def accept(self) -> None:
        """Takes a reply whose partial sum device code reads from the payload before the next
        dispatch. Raises LaneError as :meth:`combine` does."""
        header = self._replied_to()
        self._outstanding = None
        self.counters.combine_bytes += header.rows * self._row_bytes

    def take_refusal(self) -> bool:
        header = self._outstanding
        assert header is not None, "no dispatch is outstanding"
        reply = _COMBINE_HEADER.unpack_from(self._link.memory, self._link.combine_header)
        refused = reply == (header.epoch, 0, 0)
        if refused:
            self._outstanding = None
        return refused

    def _replied_to(self) -> DispatchHeader:
        """The dispatch that the FFN rank has replied to."""
        link, header = self._link, self._outstanding
        if header is None or not self.ready():
            raise link.error("nothing to combine")
        epoch, rows, row_bytes = _COMBINE_HEADER.unpack_from(link.memory, link.combine_header)
        if (epoch, rows, row_bytes) != (header.epoch, header.rows, self._row_bytes):
            raise link.error(
                f"the reply (epoch {epoch}, {rows} rows of {row_bytes} bytes) does not fit the"
                f" dispatch (epoch {header.epoch}, {header.rows} rows of {self._row_bytes} bytes)"
            )
        return header

    def _check_free(self) -> None:
        if not self.free:
            raise self._link.error("a dispatch is outstanding")


class SharedMemoryFFNLink(_End):
    """The :class:`~crosspool.transport.data_path.FFNLink` through the segment."""

    def __init__(self, link: SegmentLink, peer: Rings) -> None:
        super().__init__(link, peer)
        self._replied = self._number = link.combined.load()
        self._polled: DispatchHeader | None = None

    def poll(self) -> DispatchHeader | None:
        if self._polled is not None:
            return self._polled
        link = self._link
        sequence = link.dispatched.load()
        if sequence == self._replied:
            return None
        # New memory begins at 0, whatever number the first dispatch has.
        if sequence != self._replied + 1 and self._replied:
            raise link.error(f"dispatch {sequence} came after reply {self._replied}")
        epoch, model, layer, rows, row_bytes = _DISPATCH_HEADER.unpack_from(
            link.memory, link.dispatch_header
        )
        link.check_size(rows, row_bytes)
        self._polled, self._row_bytes = DispatchHeader(epoch, model, layer, rows), row_bytes
        self._number = sequence
        return self._polled

    def hidden(self, dtype: torch.dtype) -> Tensor:
        link, header = self._link, self._polled
        if header is None:
            raise link.error("no dispatch was polled")
        return link.view(link.dispatch_payload, header.rows, self._row_bytes, dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of each row of the polled dispatch."""
        return self._row_bytes

    def reply(self, partial: Tensor) -> None:
        link, header = self._link, self._polled
        if header is None:
            raise link.error("no dispatch to reply to")
        rows, row_bytes = header.rows, self._row_bytes
        if partial.dim() != 2 or partial.shape[0] != rows:
            raise link.error(f"a partial sum {tuple(partial.shape)} does not fit {rows} rows")
        if partial.shape[1] * partial.itemsize != row_bytes:
            raise link.error(
                f"a partial sum {tuple(partial.shape)} of {partial.dtype} does not fit rows of"
                f" {row_bytes} bytes"
            )
        link.fill(link.combine_payload, row_bytes, partial)
        self.announce_reply()

    def announce_reply(self) -> None:
        """Publishes a partial sum that device code has written into the payload.

        Raises LaneError when nothing was polled."""
        link, header = self._link, self._polled
        if header is None:
            raise link.error("no dispatch to reply to")
        rows, row_bytes = header.rows, self._row_bytes
        self._publish(header.epoch, rows, row_bytes)
        self.counters.dispatches += 1
        self.counters.rows += rows
        self.counters.dispatch_bytes += rows * row_bytes
        self.counters.combine_bytes += rows * row_bytes

    def refuse(self) -> None:
        if self._polled is None:
            raise self._link.error("no dispatch to refuse")
        self._publish(self._polled.epoch, 0, 0)

    def _publish(self, epoch: int, rows: int, row_bytes: int) -> None:
        link = self._link
        _COMBINE_HEADER.pack_into(link.memory, link.combine_header, epoch, rows, row_bytes)
        self._replied = self._number
        self._polled = None
        link.combined.store(self._replied)
        self._peer.ring()
