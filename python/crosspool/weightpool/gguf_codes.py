"""Turns blocks of GGUF into the codes, scales and minima that kernels read.

The package ``gguf`` can turn blocks into floats alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from crosspool.models.held_forms import HeldForm
from crosspool.weightpool.dequantize import Coded, in_type

Array: TypeAlias = np.ndarray[Any, Any]
Parts: TypeAlias = tuple[Array, Array, Array | None]
"""Codes [rows, blocks, values], scales [rows, blocks, groups] and minima likewise."""


def coded_blocks(stored: Array, kind: str, form: HeldForm, columns: slice) -> Coded:
    """Returns ``columns`` of rows as ``form`` has them. ``stored``: uint8 [rows, blocks, bytes of a
    block] of the type ``kind``. ``columns``: of the values of those blocks; they begin and end with
    a group."""
    codes, scales, minima = _READERS[kind](stored)
    groups = slice(columns.start // form.group, columns.stop // form.group)

    def cut(values: Array, part: slice) -> torch.Tensor:
        rows: Array = values.reshape(values.shape[0], -1)[:, part]
        return torch.from_numpy(np.ascontiguousarray(rows))

    return Coded(
        cut(codes.view(np.uint8), columns),
        in_type(cut(scales, groups), form),
        None if minima is None else in_type(cut(minima, groups), form),
    )


def _halves(stored: Array, first: int) -> Array:
    """The float16 at a byte of each block, as float32 [rows, blocks, 1]."""
    return np.ascontiguousarray(stored[..., first : first + 2]).view(np.float16).astype(np.float32)


def _nibbles(stored: Array, run: int) -> Array:
    """Values of 4 bits: of each ``run`` bytes the lower halves, and then the upper ones."""
    runs = stored.reshape(*stored.shape[:-1], -1, run)
    return np.stack((runs & 15, runs >> 4), axis=-2).reshape(*stored.shape[:-1], -1)


def _q4_0(stored: Array) -> Parts:
    return _nibbles(stored[..., 2:], 16), _halves(stored, 0), None


def _q8_0(stored: Array) -> Parts:
    return np.ascontiguousarray(stored[..., 2:]), _halves(stored, 0), None


def _six_bits(stored: Array) -> tuple[Array, Array]:
    """The eight scales and eight minima of a block of Q4_K or Q5_K, whose last two bits lie with
    those of others in the 12 bytes."""
    first, second, rest = (stored[..., i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate((first & 63, rest & 15 | first >> 6 << 4), axis=-1)
    minima = np.concatenate((second & 63, rest >> 4 | second >> 6 << 4), axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _scaled_twice(stored: Array) -> tuple[Array, Array]:
    scales, minima = _six_bits(stored[..., 4:16])
    return _halves(stored, 0) * scales, _halves(stored, 2) * minima


def _q4_k(stored: Array) -> Parts:
    return _nibbles(stored[..., 16:], 32), *_scaled_twice(stored)


def _q5_k(stored: Array) -> Parts:
    """The fifth bit of run i of 32 values is bit i of 32 bytes."""
    fifth = stored[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _nibbles(stored[..., 48:], 32) | fifth.reshape(*stored.shape[:-1], -1) << 4
    return codes, *_scaled_twice(stored)


def _q6_k(stored: Array) -> Parts:
    """Each half of a block has 64 bytes with lower bits, and 32 with upper ones: bits 2 i of them
    belong to run i of 32 values."""
    lower = _nibbles(stored[..., :128], 64)
    pairs = stored[..., 128:192].reshape(*stored.shape[:-1], 2, 1, 32)
    upper = pairs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = lower | upper.reshape(lower.shape) << 4
    scales = np.ascontiguousarray(stored[..., 192:208]).view(np.int8).astype(np.float32)
    return codes, _halves(stored, 208) * scales, None


def _mxfp4(stored: Array) -> Parts:
    exponents = stored[..., :1].astype(np.int32) - 127
    return _nibbles(stored[..., 1:], 16), np.ldexp(np.float32(1), exponents), None


_READERS: dict[str, Callable[[Array], Parts]] = {
    "Q4_0": _q4_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}
