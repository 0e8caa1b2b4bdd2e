"""Describes to the native packers what they read: tensors, and the codes of quantised matrices, in
the order of rows in which they are packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosspool.kernels import native_structs as ns
from crosspool.ranks.resident.arena import round_up
from crosspool.weightpool.dequantize import Coded

NATIVE_DTYPES = {torch.bfloat16: ns.BFLOAT16, torch.float32: ns.FLOAT32}


def source(tensor: Tensor) -> ns.Source:
    """Describes the rows of a tensor [n, k] of any strides, which must outlive its packing."""
    return ns.Source(tensor.data_ptr(), tensor.shape[0], tensor.stride(0), tensor.stride(1))


def code_source(coded: Coded) -> ns.CodeSource:
    """Describes codes, scales and offsets, which must outlive their packing."""
    codes = coded.codes
    return ns.CodeSource(
        codes.data_ptr(),
        codes.shape[0],
        codes.stride(0),
        coded.scales.data_ptr(),
        pointer(coded.offsets),
    )


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element; None, a null pointer, without a tensor."""
    return None if tensor is None else tensor.data_ptr()


def gated_columns(width: int) -> int:
    """Columns that each half of a gated pair of ``width`` takes, with padding."""
    return round_up(width, ns.DEPTH)


def joined(coded: Sequence[Coded]) -> Coded:
    """Rows of matrices that follow one another."""
    offsets = [one.offsets for one in coded if one.offsets is not None]
    return Coded(
        torch.cat([one.codes for one in coded]),
        torch.cat([one.scales for one in coded]),
        torch.cat(offsets) if offsets else None,
    )


def alternating(gate: Coded, up: Coded) -> Coded:
    """Rows of a gated pair: 16 of gate, 16 of up, with padding."""

    def both(first: Tensor, second: Tensor) -> Tensor:
        rows = gated_columns(first.shape[0])
        pair = torch.zeros(2, rows, first.shape[1], dtype=first.dtype)
        pair[0, : len(first)], pair[1, : len(second)] = first, second
        panels: Tensor = pair.unflatten(1, (-1, ns.PANEL)).transpose(0, 1)
        return panels.flatten(0, 2).contiguous()

    offsets = None
    if gate.offsets is not None and up.offsets is not None:
        offsets = both(gate.offsets, up.offsets)
    return Coded(both(gate.codes, up.codes), both(gate.scales, up.scales), offsets)
