"""Floats in the order in which the kernels choose among them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """int32 keys in the order of float32 ``x``; every NaN above all numbers, zeros of both signs
    equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, keys)
