"""Arguments of the native kernels, made of torch tensors: addresses, packed weights, places of
rows, rope tables."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from crosspool.kernels import native_structs as ns
from support import kernel_structs as ks
from torch import Tensor

DTYPES = {torch.bfloat16: ns.BFLOAT16, torch.float32: ns.FLOAT32}
KV_DTYPES = {
    torch.float8_e4m3fn: ns.KV_DTYPES["fp8_e4m3"],
    torch.float8_e5m2: ns.KV_DTYPES["fp8_e5m2"],
}
"""Caches whose dtype is not the model's."""


def pointer(tensor: Tensor | None) -> int | None:
    """A tensor's address."""
    return None if tensor is None else tensor.data_ptr()


def aligned(nbytes: int) -> Tensor:
    """uint8 memory that begins on a 64-byte border."""
    memory = torch.empty(nbytes + 63, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    return memory[begin : begin + nbytes]


class PackedMatrix:
    """Weights in the kernels' layout; owns their memory."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, encoding: int) -> None:
        """Memory for [n, k] weights, which ``NativeKernels.pack`` fills."""
        self.struct = ns.Matrix(None, n, k, DTYPES[dtype], encoding)
        self.memory = aligned(self.struct.bytes)
        self.struct.data = pointer(self.memory)
        self.panels = ns.round_up(n, ns.PANEL) // ns.PANEL


class GroupedMatrix(PackedMatrix):
    """Quantised weights in the kernels' layout."""

    def __init__(
        self,
        n: int,
        k: int,
        dtype: torch.dtype,
        *,
        codes: str,
        scales: Tensor,
        group: int,
        offset: str,
    ) -> None:
        """``scales``: of the type and number [n, groups] that the matrix has."""
        self.struct = ns.Matrix(None, n, k, DTYPES[dtype], ns.GROUPED)
        self.struct.codes = ns.CODES[codes]
        self.struct.scales = ns.SCALE_TYPES[str(scales.dtype).removeprefix("torch.")]
        self.struct.group, self.struct.offset = group, ns.OFFSETS[offset]
        self.memory = aligned(self.struct.bytes)
        self.struct.data = pointer(self.memory)
        self.panels = ns.round_up(n, ns.PANEL) // ns.PANEL


@dataclass(frozen=True)
class RowPlaces:
    """Where a batch's rows stand: position in the sequence, page, offset in the page; int32 [T]
    each."""

    positions: Tensor
    pages: Tensor
    offsets: Tensor

    def structs(self) -> ctypes.Array[ks.RowPlace]:
        rows = zip(self.positions.tolist(), self.pages.tolist(), self.offsets.tolist(), strict=True)
        return (ks.RowPlace * len(self.positions))(*(ks.RowPlace(*row) for row in rows))


@dataclass(frozen=True)
class RopeTables:
    """How heads are rotated; the fields are those of :class:`crosspool.models.spec.RopeSpec`."""

    cos: Tensor
    """Cosines by position, float32 [positions, dim / 2], rounded to the model's dtype unless
    ``fp32``."""
    sin: Tensor
    interleaved: bool = False
    fp32: bool = False

    def struct(self) -> ns.Rope:
        assert self.cos.is_contiguous() and self.sin.is_contiguous()
        width = 2 * self.cos.shape[1]
        return ns.Rope(pointer(self.cos), pointer(self.sin), width, self.interleaved, self.fp32)
