"""Tiles into which products are cut. They are chosen from shapes alone, so that a capture fixes
them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MULTIPROCESSORS = 132
"""Multiprocessors of an H100 or H200. A grid of fewer programs leaves some of them idle."""
FEW_ROWS = 16
"""Smallest side of a tensor core's tile. Up to so many rows cost the same arithmetic."""
_STAGE_BYTES = 8 << 10
"""Bytes of weights that a program asks for at a time in a product with few rows. With four stages
and two programs, a multiprocessor has 64 KiB in flight, about twice its share of the memory's
bandwidth times the latency."""


@dataclass(frozen=True)
class Tile:
    """The tile of one program, and how the program runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def depth_block(k: int, most: int = 256) -> int:
    """Returns the largest power of two that divides ``k``, up to ``most``. Raises ValueError below
    16."""
    block = min(k & -k, most)
    if block < 16:
        raise ValueError(f"a product's inner dimension must be a multiple of 16, not {k}")
    return block


def product_tile(bucket: int, n: int, k: int, dtype: torch.dtype, matrices: int = 1) -> Tile:
    """Returns the tile for ``bucket`` rows times weights [n, k]; ``matrices``: weights read side by
    side."""
    few = bucket <= FEW_ROWS
    if dtype == torch.float32:
        return Tile(16 if few else 32, 16, depth_block(k, 64), 4, 2)
    if few:
        columns = 64 if n >= 128 * MULTIPROCESSORS else 32 if n >= 64 * MULTIPROCESSORS else 16
        depth = depth_block(k, max(64, _STAGE_BYTES // (2 * columns)))
        stages = 3 if matrices > 1 else 4
        return Tile(FEW_ROWS, columns, depth, 2 if columns == 16 else 4, stages)
    if bucket <= 64:
        return Tile(32 if bucket <= 32 else 64, 64 // matrices, depth_block(k, 128), 4, 3)
    return Tile(64, 128 // matrices, depth_block(k, 64), 4, 4)
