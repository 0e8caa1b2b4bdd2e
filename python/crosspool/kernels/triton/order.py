"""The order in which kernels choose among floats."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """Returns int32 keys in the order of float32 ``x``: every NaN lies above all numbers, zeros of
    both signs are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, keys)
