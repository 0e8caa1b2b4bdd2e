"""Grouped-query attention's rows between projection and attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton import cache
from crosspool.kernels.triton.batch import DeviceBatch, RopeTable, pair_places, rotated, row_slot
from crosspool.kernels.triton.cache import cache_at
from crosspool.kernels.triton.tables import TensorTable, pointer_at, tl_dtype


def gqa_prepare(
    qkv: torch.Tensor,
    batch: DeviceBatch,
    layer: torch.Tensor,
    rope: RopeTable,
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    kv_heads: int,
    q_norm: TensorTable | None = None,
    k_norm: TensorTable | None = None,
    eps: float = 0.0,
    clip: float | None = None,
) -> None:
    """QK-norm, clip, rotation, KV append, in this order.

    ``qkv`` [bucket, (q_heads + 2 * kv_heads) * head_dim]: q heads, K heads, V heads. Writes ``q``
    [bucket, q_heads, head_dim] and the rows' slots of ``kv`` [pages, layers, page_size,
    2 * kv_heads * head_dim]. Norm tables of [head_dim] norm every head on its own, tables of
    [q_heads * head_dim] and [kv_heads * head_dim] all heads at once; None: no norm, of q and K
    alike. ``rope.dim`` is head_dim."""
    bucket, q_heads, head_dim = q.shape
    full = q_norm is not None and q_norm.shape[0] != head_dim
    _gqa_prepare_kernel[(bucket, q_heads + 2 * kv_heads)](
        qkv,
        qkv.stride(0),
        None if q_norm is None else q_norm.pointers,
        None if k_norm is None else k_norm.pointers,
        batch.count,
        batch.positions,
        batch.sequences,
        batch.page_table,
        batch.page_table.stride(0),
        layer,
        rope.cos,
        rope.sin,
        q,
        cache.address_of(kv),
        kv.shape[1],
        eps,
        0.0 if clip is None else clip,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        INTERLEAVED=rope.interleaved,
        FULL=full,
        CLIP=clip is not None,
        WEIGHT=None if q_norm is None else tl_dtype(q_norm.dtype),
        KV=tl_dtype(kv.dtype),
        PAGE_SIZE=kv.shape[2],
        BLOCK=triton.next_power_of_2(head_dim // 2),
        FULL_BLOCK=triton.next_power_of_2(q_heads * head_dim) if full else 1,
        num_warps=4 if full else 1,
    )


@triton.jit
def _gqa_prepare_kernel(
    qkv: tl.tensor,
    qkv_stride: tl.tensor,
    q_norms: tl.tensor,  # or None
    k_norms: tl.tensor,
    count: tl.tensor,
    positions: tl.tensor,
    sequences: tl.tensor,
    page_table: tl.tensor,
    table_stride: tl.tensor,
    layer: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    q: tl.tensor,
    kv: tl.int64,
    layers: tl.tensor,
    eps: tl.tensor,
    clip: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    CLIP: tl.constexpr,
    WEIGHT: tl.constexpr,
    KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    head = tl.program_id(1)
    if row >= tl.load(count):
        return
    index = tl.load(layer)
    position, slot = row_slot(
        row,
        positions,
        sequences,
        page_table,
        table_stride,
        cache_at(kv, KV),
        index,
        layers,
        PAGE_SIZE,
        2 * KV_HEADS * 2 * HALF,
    )
    line = qkv + row.to(tl.int64) * qkv_stride
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    is_value = head >= Q_HEADS + KV_HEADS
    if INTERLEAVED and not is_value:
        first_at, second_at = pair_places(i, HALF, True)
    else:
        first_at, second_at = pair_places(i, HALF, False)
    first = tl.load(line + head * 2 * HALF + first_at, inside, other=0.0).to(tl.float32)
    second = tl.load(line + head * 2 * HALF + second_at, inside, other=0.0).to(tl.float32)
    if q_norms is not None and not is_value:
        is_query = head < Q_HEADS
        norms = q_norms if is_query else k_norms
        weight = pointer_at(norms, index, WEIGHT)
        if FULL:
            width = (Q_HEADS if is_query else KV_HEADS) * 2 * HALF
            start = 0 if is_query else Q_HEADS * 2 * HALF
            weight += (head if is_query else head - Q_HEADS) * 2 * HALF
            j = tl.arange(0, FULL_BLOCK)
            whole = tl.load(line + start + j, j < width, other=0.0).to(tl.float32)
            squares = tl.sum(whole * whole, 0) / width
        else:
            squares = tl.sum(first * first + second * second, 0) / (2 * HALF)
        inverse = tl.rsqrt(squares + eps)
        first *= inverse * tl.load(weight + first_at, inside, other=0.0).to(tl.float32)
        second *= inverse * tl.load(weight + second_at, inside, other=0.0).to(tl.float32)
    if CLIP:
        first = tl.minimum(tl.maximum(first, -clip), clip)
        second = tl.minimum(tl.maximum(second, -clip), clip)
    if not is_value:
        first, second = rotated(first, second, cosines, sines, position, i, inside, HALF)
    if head < Q_HEADS:
        to = q + (row.to(tl.int64) * Q_HEADS + head) * 2 * HALF
    else:
        to = slot + (head - Q_HEADS) * 2 * HALF
    tl.store(to + i, first.to(KV), inside)
    tl.store(to + HALF + i, second.to(KV), inside)
