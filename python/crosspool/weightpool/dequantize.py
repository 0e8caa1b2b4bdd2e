"""Turns the tensors of a quantised matrix into float32 weights, or into the codes, scales and zero
points that kernels read, for any rows and columns of it.

This is the reference of every format: plain operations of torch, in the order in which the format's
rule is written. :mod:`crosspool.models.schemes` says which tensors there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from crosspool.models.held_forms import HeldForm
from crosspool.models.schemes import (
    AWQ,
    GPTQ,
    MXFP4,
    MXFP4_GROUP,
    Elements,
    PackedWords,
    Rounded,
    Scheme,
    Stack,
)

Index: TypeAlias = tuple[slice, ...]
ReadTensor: TypeAlias = Callable[[str, Index], Tensor]
"""Reads a part of the tensor that has a role; an empty index stands for all of it."""

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place within a word of each of eight neighbouring values."""
_INT8_MAX = 127
_E4M3_NAN = 0x7F
_ROWS_AT_ONCE = 256
_SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Grouped:
    """A part of a quantised matrix: weight [i, j] is (value[i, j] - zero[i, g]) * scale[i, g],
    where g is the group of column j."""

    values: Tensor
    """[n, k], int16, or float8; with a table, places in it."""
    scale: Tensor
    """float32 [n, groups]."""
    groups: Tensor
    """int64 [k]."""
    zeros: Tensor | None = None
    """[n, groups]."""
    table: Tensor | None = None

    def is_finite(self) -> bool:
        """Whether all weights are finite."""
        if self.values.dtype == torch.float8_e4m3fn:
            numbers = self.values.view(torch.uint8) & _E4M3_NAN
            if numbers.numel() and int(numbers.max()) == _E4M3_NAN:
                return False
        return bool(self.scale.isfinite().all())

    def floats(self) -> Tensor:
        """Returns the weights in float32. Some rows are made at a time, so that memory holds little
        beside the result."""
        out = torch.empty(self.values.shape, dtype=torch.float32)
        for begin in range(0, len(out), _ROWS_AT_ONCE):
            rows = slice(begin, begin + _ROWS_AT_ONCE)
            values = self.values[rows]
            if self.table is not None:
                values = self.table[values.long()]
            elif self.zeros is not None:
                values = values - self.zeros[rows][:, self.groups]
            torch.mul(values.float(), self.scale[rows][:, self.groups], out=out[rows])
        return out

    def coded(self, form: HeldForm) -> Coded:
        """Returns the part as kernels read it. It begins and ends with a group."""
        held = slice(int(self.groups[0]), int(self.groups[-1]) + 1)
        values, zeros = self.values, self.zeros
        if form.codes == "e4m3":
            codes = values.view(torch.uint8).contiguous()
            return Coded(codes, in_type(self.scale[:, held], form), None)
        if form.codes == "int4":
            values = values + 8
        elif form.codes == "int8" and values.max() > _INT8_MAX:
            values, zeros = values - 128, None if zeros is None else zeros - 128
        return Coded(
            values.to(torch.int8).view(torch.uint8).contiguous(),
            in_type(self.scale[:, held], form),
            None if zeros is None else in_type(zeros[:, held], form),
        )


@dataclass(frozen=True)
class Coded:
    """A part of a matrix as kernels read it."""

    codes: Tensor
    """uint8 [n, k]; int8 as two's complement."""
    scales: Tensor
    """[n, groups], of the form's type."""
    offsets: Tensor | None
    """Zero points or minima, likewise."""


def in_type(scales: Tensor, form: HeldForm) -> Tensor:
    """Returns scales, or offsets, in the type of a form."""
    return scales.to(_SCALE_DTYPES[form.scales]).contiguous()


def read_grouped(
    scheme: Scheme, shape: tuple[int, int], index: Index, stack: Stack | None, read: ReadTensor
) -> Grouped:
    """Reads the part ``index`` of a matrix of ``shape``."""
    rows, columns = (slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    if isinstance(scheme, Elements):
        return _elements(scheme, shape, rows, columns, read)
    if isinstance(scheme, PackedWords):
        return _packed_words(scheme, shape, rows, columns, read)
    if isinstance(scheme, GPTQ):
        return _gptq(scheme, shape, rows, columns, read)
    if isinstance(scheme, AWQ):
        return _awq(scheme, shape, rows, columns, read)
    if isinstance(scheme, Rounded):
        return _rounded(scheme, shape, rows, columns, read)
    assert isinstance(scheme, MXFP4)
    return _mxfp4(rows, columns, stack, read)


def _elements(
    scheme: Elements, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Grouped:
    n, k = shape
    row_blocks = torch.arange(rows.start, rows.stop) // (scheme.block[0] or n)

    def of_rows(role: str) -> Tensor:
        return _floats(read(role, ())).reshape(scheme.grid(n, k))[row_blocks]

    values = read("weight", (rows, columns))
    return Grouped(
        values if values.dtype == torch.float8_e4m3fn else values.to(torch.int16),
        of_rows("scale"),
        torch.arange(columns.start, columns.stop) // (scheme.block[1] or k),
        None if scheme.symmetric else of_rows("zeros").to(torch.int16),
    )


def _packed_words(
    scheme: PackedWords, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Grouped:
    half = 1 << (scheme.bits - 1)
    packed = read("weight", (rows, _over(columns, scheme.per_word)))
    values = _unpacked(packed, scheme.bits)[:, _within(columns, scheme.per_word)] - half
    groups = _groups_of(scheme.block[1] or shape[1], scheme.act_order, columns, read)
    scale = read("scale", (rows,)).float()
    if scheme.symmetric:
        return Grouped(values, scale, groups)
    packed = read("zeros", (_over(rows, scheme.per_word),))
    zeros = _unpacked(packed.T, scheme.bits).T[_within(rows, scheme.per_word)]
    return Grouped(values + half, scale, groups, zeros)


def _gptq(
    scheme: GPTQ, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Grouped:
    packed = read("weight", (_over(columns, scheme.per_word), rows))
    values = _unpacked(packed.T, scheme.bits)[:, _within(columns, scheme.per_word)]
    packed = read("zeros", (slice(None), _over(rows, scheme.per_word)))
    if scheme.zeros_less_one:
        # The inverse of what the writers do: they take one from each value of a word at once, and
        # what is borrowed comes back as the sum wraps around.
        packed = packed + sum(1 << bit for bit in range(0, 32, scheme.bits))
    zeros = _unpacked(packed, scheme.bits)[:, _within(rows, scheme.per_word)].T
    scale = read("scale", (slice(None), rows)).float().T
    groups = _groups_of(scheme.block[1] or shape[1], scheme.act_order, columns, read)
    return Grouped(values, scale, groups, zeros)


def _awq(
    scheme: AWQ, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Grouped:
    over, within = _over(rows, scheme.per_word), _within(rows, scheme.per_word)

    def unpacked(role: str, index: Index) -> Tensor:
        """The values [n, k], or [n, groups]."""
        values = _unpacked(read(role, (*index, over)), scheme.bits).unflatten(1, (-1, 8))
        ordered: Tensor = values[:, :, list(_AWQ_PLACES)].flatten(1)
        return ordered[:, within].T

    return Grouped(
        unpacked("weight", (columns,)),
        read("scale", (slice(None), rows)).float().T,
        _groups_of(scheme.block[1] or shape[1], False, columns, read),
        unpacked("zeros", (slice(None),)),
    )


def _mxfp4(rows: slice, columns: slice, stack: Stack | None, read: ReadTensor) -> Grouped:
    over = _over(columns, MXFP4_GROUP)
    if stack is None:
        packed = read("weight", (rows, _over(columns, 2)))
        exponents = read("scale", (rows, over))
        first_column = columns.start // 2 * 2
    else:
        stored = slice(
            stack.first + rows.start * stack.step, stack.first + rows.stop * stack.step, stack.step
        )
        expert = slice(stack.index, stack.index + 1)
        packed = read("weight", (expert, stored, over))[0].flatten(1)
        exponents = read("scale", (expert, stored, over))[0]
        first_column = over.start * MXFP4_GROUP
    values = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    return Grouped(
        values[:, columns.start - first_column : columns.stop - first_column],
        _floats(exponents),
        torch.arange(columns.start, columns.stop) // MXFP4_GROUP - over.start,
        table=torch.tensor([*_E2M1, *(-value for value in _E2M1)]),
    )


def _rounded(
    scheme: Rounded, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Grouped:
    size = scheme.block[1] or shape[1]
    over = _over(columns, size)
    first, last = over.start * size, min(over.stop * size, shape[1])
    weight = read("weight", (rows, slice(first, last))).float()
    within = slice(columns.start - first, columns.stop - first)
    groups = torch.arange(columns.start, columns.stop) // size - over.start
    grouped = weight.unflatten(1, (-1, size))
    if scheme.values == "int4":
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        # Of 16 bits, so that the scale that is held is the one that values were rounded with.
        scale = _of_zeros((high - low).div(15).half().float())
        zeros = (-low / scale).round().clamp(0, 15)
        values = (grouped / scale[..., None]).round() + zeros[..., None]
        values = values.clamp(0, 15).flatten(1).to(torch.int16)
        return Grouped(values[:, within], scale, groups, zeros.to(torch.int16))
    most = _INT8_MAX if scheme.values == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scale = _of_zeros(grouped.abs().amax(2) / most)
    values = (grouped / scale[..., None]).flatten(1)[:, within]
    if scheme.values == "int8":
        return Grouped(values.round().to(torch.int16), scale, groups)
    return Grouped(values.to(torch.float8_e4m3fn), scale, groups)


def _of_zeros(scale: Tensor) -> Tensor:
    """Scales, with one for groups of zeros."""
    return torch.where(scale == 0, 1.0, scale)


def _floats(values: Tensor) -> Tensor:
    """Scales as floats; bytes are exponents of two (e8m0, where 255 is NaN)."""
    if values.dtype == torch.uint8:
        values = values.view(torch.float8_e8m0fnu)
    return values.float()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The values of words [r, c], the first in the lowest bits: int16 [r, c * values per word]."""
    values = words.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=2).flatten(1)
    return values.to(torch.int16)


def _over(part: slice, unit: int) -> slice:
    """The words, or blocks, in which the elements lie."""
    return slice(part.start // unit, -(-part.stop // unit))


def _within(part: slice, unit: int) -> slice:
    """The elements within those words."""
    first = part.start // unit * unit
    return slice(part.start - first, part.stop - first)


def _groups_of(size: int, act_order: bool, columns: slice, read: ReadTensor) -> Tensor:
    """The group of each column of the part."""
    if act_order:
        return read("groups", (columns,)).long()
    return torch.arange(columns.start, columns.stop) // size
