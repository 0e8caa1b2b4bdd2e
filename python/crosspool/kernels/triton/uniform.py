"""NumPy's Philox4x64-10 (Salmon et al., SC 2011): a random number as a function of two keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def draw_uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Returns the number in [0, 1), float64, that decides the token at ``position``; it equals
    crosspool.ranks.sampler.uniform bit for bit. Both arguments are int64; ``seed`` has the bits of
    the unsigned seed."""
    first_factor = tl.full([], 0xD2E7470EE14C6C93, tl.uint64)
    second_factor = tl.full([], 0xCA5A826395121157, tl.uint64)
    key0 = seed.to(tl.uint64, bitcast=True)
    key1 = position.to(tl.uint64, bitcast=True)
    c0 = tl.full([], 1, tl.uint64)  # NumPy counts before it draws
    c1 = tl.full([], 0, tl.uint64)
    c2 = tl.full([], 0, tl.uint64)
    c3 = tl.full([], 0, tl.uint64)
    for _ in tl.static_range(10):
        next0 = tl.umulhi(second_factor, c2) ^ c1 ^ key0
        next2 = tl.umulhi(first_factor, c0) ^ c3 ^ key1
        c1 = second_factor * c2
        c3 = first_factor * c0
        c0 = next0
        c2 = next2
        key0 += tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
        key1 += tl.full([], 0xBB67AE8584CAA73B, tl.uint64)
    return (c0 >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)
