"""NVSHMEM's dispatch and reply kernels (sgl-kernel-ext/cuda/nvshmem.cu) between heaps in plain
memory: what an end has written is copied to the same place of its peer's heap, its signal last."""

from __future__ import annotations

import ctypes

from crosspool.kernels.cuda_loop_structs import StageWords
from crosspool.kernels.nvshmem import LinkEnd
from crosspool.transport.lane_layout import LINK_HEAD_BYTES

_DISPATCHED, _DISPATCH, _COMBINED, _COMBINE = 0, 64, 128, 192


class _DispatchHeader(ctypes.Structure):
    _fields_ = (
        ("epoch", ctypes.c_uint64),
        ("model", ctypes.c_uint32),
        ("layer", ctypes.c_uint32),
        ("rows", ctypes.c_uint32),
        ("row_bytes", ctypes.c_uint32),
    )


class _CombineHeader(ctypes.Structure):
    _fields_ = (
        ("epoch", ctypes.c_uint64),
        ("rows", ctypes.c_uint32),
        ("row_bytes", ctypes.c_uint32),
    )


class FakePE:
    """One PE; ``heaps``: first byte of every PE's symmetric memory."""

    def __init__(self, pe: int, heaps: dict[int, int]) -> None:
        self._pe, self._heaps = pe, heaps
        self.carried = 0

    def capture_dispatch(
        self, end: LinkEnd, *, words: int, epoch: int, model: int, row_bytes: int, stream: int
    ) -> None:
        assert stream == 0
        said = StageWords.from_address(words)
        header = _DispatchHeader.from_address(end.link + _DISPATCH)
        header.epoch, header.model, header.layer = epoch, model, said.layer
        header.rows, header.row_bytes = said.rows, row_bytes
        self._carry(end, _DISPATCH, ctypes.sizeof(header))
        self._carry(end, LINK_HEAD_BYTES, said.rows * row_bytes)
        self._signal(end, _DISPATCHED, _number(end.link + _DISPATCHED) + 1)

    def capture_reply(self, ends: int, payload_bytes: int, words: int, stream: int) -> None:
        assert stream == 0
        link = StageWords.from_address(words).link
        end = LinkEnd.from_address(ends + link * ctypes.sizeof(LinkEnd))
        asked = _DispatchHeader.from_address(end.link + _DISPATCH)
        header = _CombineHeader.from_address(end.link + _COMBINE)
        header.epoch, header.rows, header.row_bytes = asked.epoch, asked.rows, asked.row_bytes
        self._carry(end, _COMBINE, ctypes.sizeof(header))
        self._carry(end, LINK_HEAD_BYTES + payload_bytes, asked.rows * asked.row_bytes)
        self._signal(end, _COMBINED, _number(end.link + _DISPATCHED))

    def _there(self, end: LinkEnd, offset: int) -> int:
        assert end.peer != self._pe
        return int(self._heaps[end.peer] + end.link - self._heaps[self._pe] + offset)

    def _carry(self, end: LinkEnd, offset: int, nbytes: int) -> None:
        ctypes.memmove(self._there(end, offset), end.link + offset, nbytes)

    def _signal(self, end: LinkEnd, offset: int, number: int) -> None:
        ctypes.c_uint64.from_address(self._there(end, offset)).value = number
        self.carried += 1


def _number(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
