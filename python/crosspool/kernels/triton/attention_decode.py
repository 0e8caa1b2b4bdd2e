"""Attention of single rows: the keys split among programs, and the merge of their results."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.attention_tile import attend_keys, store_heads
from crosspool.kernels.triton.batch import is_single
from crosspool.kernels.triton.cache import cache_at


@triton.jit
def _split_range(
    position: tl.tensor, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns the first key that a row sees, and how many keys a split takes, a multiple of
    BLOCK_N."""
    begin = position * 0
    if WINDOW > 0:
        begin = tl.maximum(position - (WINDOW - 1), 0)
    keys = position + 1 - begin
    return begin, tl.cdiv(tl.cdiv(keys, SPLITS), BLOCK_N) * BLOCK_N


@triton.jit
def decode_kernel(
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
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
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
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    split = tl.program_id(0)
    row = tl.program_id(2)
    rows = tl.load(count)
    if row >= rows:
        return
    sequence = tl.load(sequences + row)
    if MIXED:
        if not is_single(sequences, row, sequence, rows):
            return
    position = tl.load(positions + row)
    begin, length = _split_range(position, WINDOW, SPLITS, BLOCK_N)
    first = begin + split * length
    last = tl.minimum(first + length, position + 1)
    if first >= last:
        return
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // BLOCKS
    within = (tl.program_id(1) % BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = within < GROUP
    heads = kv_head * GROUP + within
    q_at = q + (row.to(tl.int64) * Q_HEADS + heads) * QK_DIM
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    result = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    limits = tl.zeros([BLOCK_H], tl.int32) + position
    highest, total, result = attend_keys(
        q_at,
        is_head,
        limits,
        cache_at(kv, KV),
        page_table + sequence.to(tl.int64) * table_stride,
        tl.load(layer),
        layers,
        kv_head,
        scale,
        first,
        last,
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
    at = (row.to(tl.int64) * Q_HEADS + heads) * SPLITS + split
    tl.store(partial_lse + at, highest + tl.log2(total), is_head)
    store_heads(partial_out + at * V_DIM, is_head, result / total[:, None], V_DIM, BLOCK_D)


@triton.jit
def merge_kernel(
    count: tl.tensor,
    positions: tl.tensor,
    sequences: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    Q_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    MIXED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    rows = tl.load(count)
    if row >= rows:
        return
    if MIXED:
        if not is_single(sequences, row, tl.load(sequences + row), rows):
            return
    position = tl.load(positions + row)
    begin, length = _split_range(position, WINDOW, SPLITS, BLOCK_N)
    splits = tl.cdiv(position + 1 - begin, length)
    line = row.to(tl.int64) * Q_HEADS + tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < V_DIM
    highest = float("-inf")
    total = 0.0
    result = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        lse = tl.load(partial_lse + line * SPLITS + s, s < splits, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(lse, 0))
        weight = tl.exp2(lse - higher)
        before = tl.exp2(highest - higher)
        part = tl.load(
            partial_out + (line * SPLITS + s)[:, None] * V_DIM + columns[None, :],
            (s < splits)[:, None] & inside[None, :],
            other=0.0,
        )
        result = result * before + tl.sum(part * weight[:, None], 0)
        total = total * before + tl.sum(weight, 0)
        highest = higher
    tl.store(out + line * V_DIM + columns, (result / total).to(out.dtype.element_ty), inside)
