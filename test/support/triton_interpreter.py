"""Triton's interpreter with bfloat16 as a GPU computes it, and under today's NumPy.

The interpreter of Triton 3.6 takes an array of one element for a number, which NumPy 2.4 no longer
does. It multiplies the bit patterns of bfloat16 operands of ``tl.dot`` as if
they were integers, and cuts float32 off to bfloat16 where a GPU rounds it to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """For this process, in which the interpreter runs."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    patch = interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        pair = (source.dtype.scalar, to.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(source.data), tl.float32)
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_wide_handle(operand) for operand in (a, b)), *rest)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor


def _rounded(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _wide_handle(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle(_widened(operand.data), tl.float32)
