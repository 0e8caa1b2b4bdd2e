"""Causal attention over the paged cache, for GQA and for absorbed MLA.

Two ways: rows one by one with the keys split among programs (decode), and blocks of rows of one
sequence that share the keys they read (prefill). Slots that a sequence has not written hold
whatever another model left there, NaN included, and are never read into a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.attention_tile import attend_keys, store_heads
from crosspool.kernels.triton.batch import DeviceBatch
from crosspool.kernels.triton.tiles import MULTIPROCESSORS

_MOST_SPLITS = 128
_MERGE_BLOCK = 16
_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionWorkspace:
    """Partial results of decode rows; one serves all layers of a lane."""

    out: torch.Tensor
    """float32 [bucket, q_heads, splits, v_dim]."""
    lse: torch.Tensor
    """float32 [bucket, q_heads, splits]: base-2 logarithms."""

    @classmethod
    def allocate(
        cls, bucket: int, q_heads: int, kv_heads: int, v_dim: int, device: torch.device
    ) -> AttentionWorkspace:
        """Splits enough to keep the device busy with ``bucket`` rows."""
        blocks = triton.cdiv(q_heads // kv_heads, _heads_block(q_heads // kv_heads))
        splits = triton.cdiv(2 * MULTIPROCESSORS, bucket * kv_heads * blocks)
        splits = min(_MOST_SPLITS, splits)
        return cls(
            out=torch.empty(bucket, q_heads, splits, v_dim, dtype=torch.float32, device=device),
            lse=torch.empty(bucket, q_heads, splits, dtype=torch.float32, device=device),
        )


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    batch: DeviceBatch,
    layer: torch.Tensor,
    out: torch.Tensor,
    workspace: AttentionWorkspace,
    *,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    mixed: bool,
) -> None:
    """``q`` [bucket, q_heads, qk_dim] against the cached keys of each row's sequence up to its own
    position, whose KV is in ``kv`` [pages, layers, page_size, kv_width] already; writes ``out``
    [bucket, q_heads, v_dim], v_dim <= qk_dim.

    KV head h has its keys at h * qk_dim of a slot. Its values lie behind all keys (GQA:
    kv_width = 2 * kv_heads * qk_dim) or are the first v_dim of the key itself (MLA, absorbed:
    kv_heads = 1, kv_width = qk_dim). ``window``: tokens that a query sees, itself included.

    ``mixed``: False: every row goes the decode way (right for any batch; each reads its keys
    itself). True: sequences with more than one row go the prefill way instead, at the cost of a
    third kernel. A choice of the capture, not of the step."""
    bucket, q_heads, qk_dim = q.shape
    v_dim, splits = out.shape[2], workspace.lse.shape[2]
    group = q_heads // kv_heads
    block_n = _keys_block(qk_dim, q.dtype)
    shape = {
        "Q_HEADS": q_heads,
        "KV_HEADS": kv_heads,
        "QK_DIM": qk_dim,
        "V_DIM": v_dim,
        "SHARED": kv.shape[3] == qk_dim * kv_heads,
        "PAGE_SIZE": kv.shape[2],
        "KV_WIDTH": kv.shape[3],
        "WINDOW": window or 0,
        "MIXED": mixed,
        "BLOCK_N": block_n,
        "BLOCK_D": triton.next_power_of_2(v_dim),
        "BLOCK_R": triton.next_power_of_2(qk_dim - v_dim) if qk_dim > v_dim else 0,
    }
    arrays = (
        q,
        kv,
        kv.shape[1],
        batch.count,
        batch.positions,
        batch.sequences,
        batch.page_table,
        batch.page_table.stride(0),
        layer,
        scale * _LOG2E,
    )
    block_h = _heads_block(group)
    blocks = triton.cdiv(group, block_h)
    _decode_kernel[(splits, kv_heads * blocks, bucket)](
        *arrays,
        workspace.out,
        workspace.lse,
        **shape,
        SPLITS=splits,
        BLOCK_H=block_h,
        num_warps=8 if v_dim > 256 or q.dtype == torch.float32 else 4,
        num_stages=2 if q.dtype == torch.float32 else 3 if v_dim > 256 else 4,
    )
    _merge_kernel[(q_heads, bucket)](
        batch.count,
        batch.positions,
        batch.sequences,
        workspace.out,
        workspace.lse,
        out,
        Q_HEADS=q_heads,
        V_DIM=v_dim,
        WINDOW=window or 0,
        MIXED=mixed,
        SPLITS=splits,
        BLOCK_N=block_n,
        BLOCK_S=min(_MERGE_BLOCK, triton.next_power_of_2(splits)),
        BLOCK_D=triton.next_power_of_2(v_dim),
        num_warps=4,
    )
    if not mixed:
        return
    block_h = min(triton.next_power_of_2(group), 32)
    block_m = 64 if v_dim > 256 else 128
    if q.dtype == torch.float32:
        block_m = max(32, block_h)
    rows = block_m // block_h
    _prefill_kernel[(triton.cdiv(bucket, rows), kv_heads * triton.cdiv(group, block_h))](
        *arrays,
        out,
        **shape,
        BLOCK_ROWS=rows,
        BLOCK_H=block_h,
        num_warps=8,
        num_stages=2,
    )


def _heads_block(group: int) -> int:
    """q heads of one KV head that a decode program takes: they share the keys it reads."""
    return 16 if group <= 16 else 32


def _keys_block(qk_dim: int, dtype: torch.dtype) -> int:
    """Keys at a time; also the grain of the splits."""
    return 32 if qk_dim > 256 or dtype == torch.float32 else 64


@triton.jit
def _is_single(
    sequences: tl.tensor, row: tl.tensor, sequence: tl.tensor, count: tl.tensor
) -> tl.tensor:
    """Whether the row is the only one of its sequence."""
    before = tl.load(sequences + row - 1, row > 0, other=-1)
    behind = tl.load(sequences + row + 1, row + 1 < count, other=-1)
    return (before != sequence) & (behind != sequence)


@triton.jit
def _split_range(
    position: tl.tensor, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first key that a row sees, and how many a split takes: a multiple of BLOCK_N."""
    begin = position * 0
    if WINDOW > 0:
        begin = tl.maximum(position - (WINDOW - 1), 0)
    keys = position + 1 - begin
    return begin, tl.cdiv(tl.cdiv(keys, SPLITS), BLOCK_N) * BLOCK_N


@triton.jit
def _decode_kernel(
    q: tl.tensor,
    kv: tl.tensor,
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
        if not _is_single(sequences, row, sequence, rows):
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
        kv,
        page_table,
        table_stride,
        sequence,
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
def _merge_kernel(
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
        if not _is_single(sequences, row, tl.load(sequences + row), rows):
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


@triton.jit
def _prefill_kernel(
    q: tl.tensor,
    kv: tl.tensor,
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
    """A tile of BLOCK_ROWS rows times BLOCK_H q heads of one KV head, whatever sequences the rows
    are of: one sequence after another, each with its own rows of the tile."""
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
    single = _is_single(sequences, own, own_sequence, rows)
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
            kv,
            page_table,
            table_stride,
            sequence,
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
