"""Turns the tensors of a quantised matrix into float32 weights, for any rows and columns of it.

This is the reference of every format: plain operations of torch, in the order in which the format's
rule is written. :mod:`crosspool.models.formats` says which tensors there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from crosspool.models.formats import (
    AWQ,
    GPTQ,
    MXFP4,
    MXFP4_GROUP,
    Elements,
    PackedWords,
    Scheme,
    Stack,
)

Index: TypeAlias = tuple[slice, ...]
ReadTensor: TypeAlias = Callable[[str, Index], Tensor]
"""Reads a part of the tensor that has a role; an empty index stands for all of it."""

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place within a word of each of eight neighbouring values."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(
    scheme: Scheme, shape: tuple[int, int], index: Index, stack: Stack | None, read: ReadTensor
) -> Tensor:
    """Returns the part ``index`` of a matrix of ``shape`` in float32."""
    rows, columns = (slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    if isinstance(scheme, Elements):
        return _elements(scheme, shape, rows, columns, read)
    if isinstance(scheme, PackedWords):
        return _packed_words(scheme, shape, rows, columns, read)
    if isinstance(scheme, GPTQ):
        return _gptq(scheme, shape, rows, columns, read)
    if isinstance(scheme, AWQ):
        return _awq(scheme, shape, rows, columns, read)
    assert isinstance(scheme, MXFP4)
    return _mxfp4(rows, columns, stack, read)


def _elements(
    scheme: Elements, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Tensor:
    n, k = shape
    row_size, column_size = scheme.block[0] or n, scheme.block[1] or k
    grid = scheme.grid(n, k)

    def of_blocks(role: str) -> Tensor:
        """One value for each of the part's weights."""
        values = _floats(read(role, ())).reshape(grid)
        row_blocks = torch.arange(rows.start, rows.stop) // row_size
        column_blocks = torch.arange(columns.start, columns.stop) // column_size
        return values[row_blocks][:, column_blocks]

    weight = read("weight", (rows, columns)).float()
    if not scheme.symmetric:
        weight -= of_blocks("zeros")
    return weight * of_blocks("scale")


def _packed_words(
    scheme: PackedWords, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Tensor:
    half = 1 << (scheme.bits - 1)
    packed = read("weight", (rows, _over(columns, scheme.per_word)))
    values = _unpacked(packed, scheme.bits)[:, _within(columns, scheme.per_word)] - half
    groups = _groups_of(scheme.block[1] or shape[1], scheme.act_order, columns, read)
    scale = read("scale", (rows,)).float()[:, groups]
    if scheme.symmetric:
        return values * scale
    packed = read("zeros", (_over(rows, scheme.per_word),))
    zeros = _unpacked(packed.T, scheme.bits).T[_within(rows, scheme.per_word)] - half
    return (values - zeros[:, groups]) * scale


def _gptq(
    scheme: GPTQ, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Tensor:
    packed = read("weight", (_over(columns, scheme.per_word), rows))
    values = _unpacked(packed.T, scheme.bits)[:, _within(columns, scheme.per_word)]
    packed = read("zeros", (slice(None), _over(rows, scheme.per_word)))
    if scheme.zeros_less_one:
        # The inverse of what the writers do: they take one from each value of a word at once.
        ones = sum(1 << bit for bit in range(0, 32, scheme.bits))
        packed = (packed.long() + ones) & 0xFFFFFFFF
    zeros = _unpacked(packed, scheme.bits)[:, _within(rows, scheme.per_word)].T
    scale = read("scale", (slice(None), rows)).float().T
    groups = _groups_of(scheme.block[1] or shape[1], scheme.act_order, columns, read)
    return (values - zeros[:, groups]) * scale[:, groups]


def _awq(
    scheme: AWQ, shape: tuple[int, int], rows: slice, columns: slice, read: ReadTensor
) -> Tensor:
    over, within = _over(rows, scheme.per_word), _within(rows, scheme.per_word)

    def unpacked(role: str, index: Index) -> Tensor:
        """The values [n, k], or [n, groups]."""
        values = _unpacked(read(role, (*index, over)), scheme.bits).unflatten(1, (-1, 8))
        ordered: Tensor = values[:, :, list(_AWQ_PLACES)].flatten(1)
        return ordered[:, within].T

    groups = _groups_of(scheme.block[1] or shape[1], False, columns, read)
    values, zeros = unpacked("weight", (columns,)), unpacked("zeros", (slice(None),))
    scale = read("scale", (slice(None), rows)).float().T
    return (values - zeros[:, groups]) * scale[:, groups]


def _mxfp4(rows: slice, columns: slice, stack: Stack | None, read: ReadTensor) -> Tensor:
    if stack is None:
        packed = read("weight", (rows, _over(columns, 2)))
        exponents = read("scale", (rows, _over(columns, MXFP4_GROUP)))
        first_column = columns.start // 2 * 2
    else:
        stored = slice(
            stack.first + rows.start * stack.step, stack.first + rows.stop * stack.step, stack.step
        )
        expert, groups = slice(stack.index, stack.index + 1), _over(columns, MXFP4_GROUP)
        packed = read("weight", (expert, stored, groups))[0].flatten(1)
        exponents = read("scale", (expert, stored, groups))[0]
        first_column = groups.start * MXFP4_GROUP
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    values = table[torch.stack((packed & 15, packed >> 4), dim=2).flatten(1).long()]
    values = values[:, columns.start - first_column : columns.stop - first_column]
    first_group = columns.start // MXFP4_GROUP
    groups_of = torch.arange(columns.start, columns.stop) // MXFP4_GROUP - first_group
    return values * _floats(exponents)[:, groups_of]


def _floats(values: Tensor) -> Tensor:
    """Scales as floats; bytes are exponents of two (e8m0, where 255 is NaN)."""
    if values.dtype == torch.uint8:
        values = values.view(torch.float8_e8m0fnu)
    return values.float()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The values of words [r, c], the first in the lowest bits: int32 [r, c * values per word]."""
    shifts = torch.arange(0, 32, bits)
    return (words.unsqueeze(2).long() >> shifts & ((1 << bits) - 1)).int().flatten(1)


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
