"""Attention of blocks of rows that share the keys of their sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.attention_tile import attend_keys, store_heads
from crosspool.kernels.triton.batch import is_single
from crosspool.kernels.triton.cache import cache_at


@triton.jit
def prefill_kernel(
    q: tl.tensor,
    kv: tl.int64,
    layers: tl.tensor,
    count: tl.tensor,
    positions: tl.tensor,
    sequences: tl.tensor,
    page_table: tl.tensor,
    table_stride: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SHARED: tl.constexpr,
    KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Attends with a tile of BLOCK_ROWS rows times BLOCK_H q heads of one KV head. The rows may be
    of several sequences: the tile takes one after another, each with its own rows."""
    rows = tl.load(count)
    row = tl.program_id(0) * BLOCK_ROWS
    if row >= rows:
        return
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // BLOCKS
    m = tl.arange(0, BLOCK_ROWS * BLOCK_H)
    within = (tl.program_id(1) % BLOCKS) * BLOCK_H + m % BLOCK_H
    own = row + m // BLOCK_H
    present = own < rows
    own_sequence = tl.load(sequences + own, present, other=-1)
    position = tl.load(positions + own, present, other=-1)
    single = is_single(sequences, own, own_sequence, rows)
    wanted = present & (within < GROUP) & (single == 0)
    line = own.to(tl.int64) * Q_HEADS + kv_head * GROUP + within
    index = tl.load(layer)
    highest = tl.full([BLOCK_ROWS * BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS * BLOCK_H], tl.float32)
    result = tl.zeros([BLOCK_ROWS * BLOCK_H, BLOCK_D], tl.float32)
    end = tl.minimum(row + BLOCK_ROWS, rows)
    while row < end:
        sequence = tl.load(sequences + row)
        mine = present & (own_sequence == sequence)
        seen = wanted & mine
        start = tl.load(positions + row)
        stop = tl.max(tl.where(seen, position, -1), 0) + 1
        first = start * 0
        if WINDOW > 0:
            first = tl.maximum(start - (WINDOW - 1), 0)
        highest, total, result = attend_keys(
            q + line * QK_DIM,
            wanted,
            tl.where(seen, position, -1),
            cache_at(kv, KV),
            page_table + sequence.to(tl.int64) * table_stride,
            index,
            layers,
            kv_head,
            scale,
            first,
            stop,
            highest,
            total,
            result,
            KV_HEADS,
            QK_DIM,
            V_DIM,
            SHARED,
            PAGE_SIZE,
            KV_WIDTH,
            WINDOW,
            BLOCK_N,
            BLOCK_D,
            BLOCK_R,
        )
        row += tl.sum(tl.where(mine & (m % BLOCK_H == 0), 1, 0), 0)
    store_heads(out + line * V_DIM, wanted, result / total[:, None], V_DIM, BLOCK_D)
