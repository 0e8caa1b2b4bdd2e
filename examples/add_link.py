"""A link of your own between an attention rank and an FFN rank: here over a pair of sockets.

Both ends implement the protocols of ``crosspool.transport.data_path``; ranks know nothing else
about an interconnect. To serve over it, add it to the factory that opens the links of a device.

    .venv/bin/python examples/add_link.py
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence

import torch
from crosspool.transport.data_path import (
    AttentionLink,
    DispatchHeader,
    FFNLink,
    LinkCounters,
    check_rows,
)

_HEADER = struct.Struct("<QIII")
"""Epoch, model, layer and rows, as DispatchHeader has them."""
_REPLIED, _REFUSED = b"+", b"-"
"""A partial sum follows; none does."""


class End:
    """What both ends share: whom they join, what has crossed, and a socket to the peer.

    Payloads are rows of float32 with ``hidden`` features; both ends know that size."""

    def __init__(self, lane: int, hidden: int, peer: socket.socket) -> None:
        self.attention_rank, self.lane, self.ffn_rank = 0, lane, 0
        self.counters = LinkCounters()
        self._hidden, self._peer = hidden, peer

    def _receive_rows(self, rows: int) -> torch.Tensor:
        data = self._peer.recv(4 * rows * self._hidden, socket.MSG_WAITALL)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(rows, self._hidden)

    def _count(self, hidden: torch.Tensor, partial: torch.Tensor) -> None:
        self.counters.dispatches += 1
        self.counters.rows += len(hidden)
        self.counters.dispatch_bytes += hidden.nbytes
        self.counters.combine_bytes += partial.nbytes


class AttentionEnd(End):
    """The attention rank's end: it dispatches rows and combines the reply."""

    free = True
    """It is asked before a dispatch, of which one at a time is made."""

    def dispatch(self, header: DispatchHeader, hidden: torch.Tensor) -> None:
        check_rows(header, hidden)
        self._dispatched, self.free = hidden, False
        self._peer.sendall(_HEADER.pack(*header) + hidden.numpy().tobytes())

    def ready(self) -> bool:
        return bool(select.select([self._peer], [], [], 0)[0])

    def take_refusal(self) -> bool:
        refused = self._peer.recv(1, socket.MSG_PEEK) == _REFUSED
        if refused:
            self._peer.recv(1)
            self.free = True
        return refused

    def combine(self, out_shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        assert self._peer.recv(1) == _REPLIED
        partial = self._receive_rows(out_shape[0])
        assert partial.shape == tuple(out_shape) and partial.dtype == dtype
        self._count(self._dispatched, partial)
        self.free = True
        return partial


class FFNEnd(End):
    """The FFN rank's end: it polls for a dispatch and replies with a partial sum."""

    _polled: tuple[DispatchHeader, torch.Tensor] | None = None

    def poll(self) -> DispatchHeader | None:
        if self._polled is None and select.select([self._peer], [], [], 0)[0]:
            header = DispatchHeader(
                *_HEADER.unpack(self._peer.recv(_HEADER.size, socket.MSG_WAITALL))
            )
            self._polled = header, self._receive_rows(header.rows)
        return None if self._polled is None else self._polled[0]

    def hidden(self, dtype: torch.dtype) -> torch.Tensor:
        assert self._polled is not None and dtype == torch.float32
        return self._polled[1]

    def reply(self, partial: torch.Tensor) -> None:
        self._count(self.hidden(partial.dtype), partial)
        self._polled = None
        self._peer.sendall(_REPLIED + partial.numpy().tobytes())

    def refuse(self) -> None:
        assert self._polled is not None
        self._polled = None
        self._peer.sendall(_REFUSED)


def main() -> None:
    hidden_size = 8
    ours, theirs = socket.socketpair()
    attention: AttentionLink = AttentionEnd(0, hidden_size, ours)
    ffn: FFNLink = FFNEnd(0, hidden_size, theirs)

    rows = torch.arange(2.0 * hidden_size).view(2, hidden_size)
    attention.dispatch(DispatchHeader(epoch=1, model=0, layer=3, rows=2), rows)
    header = ffn.poll()
    assert header is not None
    print(f"the FFN rank polls layer {header.layer} of model {header.model}, {header.rows} rows")
    ffn.reply(2 * ffn.hidden(torch.float32))
    while not attention.ready():
        pass
    assert not attention.take_refusal()
    partial = attention.combine(rows.shape, torch.float32)
    assert torch.equal(partial, 2 * rows)
    print(f"the attention rank combines {tuple(partial.shape)}; {attention.counters}")


if __name__ == "__main__":
    main()
