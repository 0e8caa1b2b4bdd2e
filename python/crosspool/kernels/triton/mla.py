"""Multi-head latent attention's rows before and after attention, in the absorbed form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.batch import DeviceBatch, RopeTable, kv_slot, rotated
from crosspool.kernels.triton.tables import TensorTable, pointer_at, tl_dtype
from crosspool.kernels.triton.tiles import depth_block


def mla_append(
    compressed: torch.Tensor,
    norm: TensorTable,
    batch: DeviceBatch,
    layer: torch.Tensor,
    rope: RopeTable,
    kv: torch.Tensor,
    *,
    eps: float,
) -> None:
    """What the cache keeps of each row: the normed latent, then the rotated rope key.

    ``compressed`` [bucket, latent + rope.dim], rows at any stride; ``norm`` table of [latent];
    writes the rows' slots of ``kv`` [pages, layers, page_size, latent + rope.dim]."""
    latent = norm.shape[0]
    _mla_append_kernel[(compressed.shape[0],)](
        compressed,
        compressed.stride(0),
        norm.pointers,
        batch.count,
        batch.positions,
        batch.sequences,
        batch.page_table,
        batch.page_table.stride(0),
        layer,
        rope.cos,
        rope.sin,
        kv,
        kv.shape[1],
        eps,
        LATENT=latent,
        HALF=rope.dim // 2,
        INTERLEAVED=rope.interleaved,
        WEIGHT=tl_dtype(norm.dtype),
        PAGE_SIZE=kv.shape[2],
        BLOCK=triton.next_power_of_2(latent),
        HALF_BLOCK=triton.next_power_of_2(rope.dim // 2),
        num_warps=2,
    )


def mla_queries(
    plain: torch.Tensor,
    kv_b: TensorTable,
    batch: DeviceBatch,
    layer: torch.Tensor,
    rope: RopeTable,
    q: torch.Tensor,
    *,
    nope: int,
) -> None:
    """Absorbed queries: q[:, h] = (plain[:, h, :nope] K_h, rotated plain[:, h, nope:]).

    ``plain`` [bucket, heads, nope + rope.dim]; ``kv_b`` table of [heads * (nope + v), latent], the
    checkpoint's ``kv_b_proj``, of which K_h is head h's first ``nope`` rows; ``q``
    [bucket, heads, latent + rope.dim]."""
    bucket, heads, _ = plain.shape
    rows, latent = kv_b.shape
    block_m = _rows(bucket)
    block_n = min(64, latent)
    _mla_queries_kernel[(heads, latent // block_n + 1, triton.cdiv(bucket, block_m))](
        plain,
        kv_b.pointers,
        batch.count,
        batch.positions,
        layer,
        rope.cos,
        rope.sin,
        q,
        HEADS=heads,
        NOPE=nope,
        LATENT=latent,
        HEAD_ROWS=rows // heads,
        HALF=rope.dim // 2,
        INTERLEAVED=rope.interleaved,
        WEIGHT=tl_dtype(kv_b.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=depth_block(nope, 64),
        HALF_BLOCK=triton.next_power_of_2(rope.dim // 2),
        num_warps=4,
    )


def mla_values(
    attended: torch.Tensor,
    kv_b: TensorTable,
    batch: DeviceBatch,
    layer: torch.Tensor,
    out: torch.Tensor,
    *,
    nope: int,
) -> None:
    """out[:, h] = attended[:, h] V_h^T: ``attended`` [bucket, heads, latent], ``out``
    [bucket, heads, v], V_h the rows of head h in ``kv_b`` that follow its K_h; v and nope are
    multiples of 16."""
    bucket, heads, latent = attended.shape
    v = out.shape[2]
    block_m = _rows(bucket)
    block_n = 16 if bucket <= 64 else depth_block(v, 64)
    _mla_values_kernel[(heads, v // block_n, triton.cdiv(bucket, block_m))](
        attended,
        kv_b.pointers,
        batch.count,
        layer,
        out,
        HEADS=heads,
        NOPE=nope,
        V=v,
        LATENT=latent,
        WEIGHT=tl_dtype(kv_b.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=depth_block(latent, 128 if kv_b.dtype == torch.bfloat16 else 64),
        num_warps=4,
    )


def _rows(bucket: int) -> int:
    return 16 if bucket <= 16 else 64


@triton.jit
def _mla_append_kernel(
    compressed: tl.tensor,
    stride: tl.tensor,
    norms: tl.tensor,
    count: tl.tensor,
    positions: tl.tensor,
    sequences: tl.tensor,
    page_table: tl.tensor,
    table_stride: tl.tensor,
    layer: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    kv: tl.tensor,
    layers: tl.tensor,
    eps: tl.tensor,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    index = tl.load(layer)
    position = tl.load(positions + row)
    sequence = tl.load(sequences + row)
    slot = kv_slot(
        kv,
        page_table,
        table_stride,
        sequence,
        position,
        index,
        layers,
        True,
        PAGE_SIZE,
        LATENT + 2 * HALF,
    )
    line = compressed + row.to(tl.int64) * stride
    i = tl.arange(0, BLOCK)
    latent = tl.load(line + i, i < LATENT, other=0.0).to(tl.float32)
    weight = tl.load(pointer_at(norms, index, WEIGHT) + i, i < LATENT, other=0.0).to(tl.float32)
    latent *= tl.rsqrt(tl.sum(latent * latent, 0) / LATENT + eps) * weight
    tl.store(slot + i, latent.to(kv.dtype.element_ty), i < LATENT)

    j = tl.arange(0, HALF_BLOCK)
    inside = j < HALF
    if INTERLEAVED:
        first_at, second_at = 2 * j, 2 * j + 1
    else:
        first_at, second_at = j, HALF + j
    first = tl.load(line + LATENT + first_at, inside, other=0.0).to(tl.float32)
    second = tl.load(line + LATENT + second_at, inside, other=0.0).to(tl.float32)
    cos = tl.load(cosines + position * HALF + j, inside, other=0.0)
    sin = tl.load(sines + position * HALF + j, inside, other=0.0)
    first, second = rotated(first, second, cos, sin)
    tl.store(slot + LATENT + j, first.to(kv.dtype.element_ty), inside)
    tl.store(slot + LATENT + HALF + j, second.to(kv.dtype.element_ty), inside)


@triton.jit
def _mla_queries_kernel(
    plain: tl.tensor,
    weights: tl.tensor,
    count: tl.tensor,
    positions: tl.tensor,
    layer: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    q: tl.tensor,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    LATENT: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    first_row = tl.program_id(2) * BLOCK_M
    if first_row >= tl.load(count):
        return
    head = tl.program_id(0)
    rows = first_row + tl.arange(0, BLOCK_M)
    present = rows < tl.load(count)
    heads = rows.to(tl.int64) * HEADS + head
    from_at = plain + (heads * (NOPE + 2 * HALF))[:, None]
    to_at = q + (heads * (LATENT + 2 * HALF))[:, None]
    if tl.program_id(1) * BLOCK_N < LATENT:
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        depths = tl.arange(0, BLOCK_K)
        weight = pointer_at(weights, tl.load(layer), WEIGHT) + head * HEAD_ROWS * LATENT
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, NOPE, BLOCK_K):
            a = tl.load(from_at + k + depths[None, :], present[:, None], other=0.0)
            w = tl.load(weight + (k + depths)[:, None] * LATENT + columns[None, :])
            total = tl.dot(a, w, total, input_precision="ieee")
        tl.store(to_at + columns[None, :], total.to(q.dtype.element_ty), present[:, None])
    else:  # the last program of a head rotates
        j = tl.arange(0, HALF_BLOCK)
        inside = present[:, None] & (j < HALF)[None, :]
        if INTERLEAVED:
            first_at, second_at = 2 * j, 2 * j + 1
        else:
            first_at, second_at = j, HALF + j
        first = tl.load(from_at + NOPE + first_at[None, :], inside, other=0.0).to(tl.float32)
        second = tl.load(from_at + NOPE + second_at[None, :], inside, other=0.0).to(tl.float32)
        position = tl.load(positions + rows, present, other=0)
        at = position[:, None] * HALF + j[None, :]
        cos = tl.load(cosines + at, inside, other=0.0)
        sin = tl.load(sines + at, inside, other=0.0)
        first, second = rotated(first, second, cos, sin)
        tl.store(to_at + LATENT + j[None, :], first.to(q.dtype.element_ty), inside)
        tl.store(to_at + LATENT + HALF + j[None, :], second.to(q.dtype.element_ty), inside)


@triton.jit
def _mla_values_kernel(
    attended: tl.tensor,
    weights: tl.tensor,
    count: tl.tensor,
    layer: tl.tensor,
    out: tl.tensor,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    V: tl.constexpr,
    LATENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    first_row = tl.program_id(2) * BLOCK_M
    if first_row >= tl.load(count):
        return
    head = tl.program_id(0)
    rows = first_row + tl.arange(0, BLOCK_M)
    present = rows < tl.load(count)
    heads = rows.to(tl.int64) * HEADS + head
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depths = tl.arange(0, BLOCK_K)
    weight = pointer_at(weights, tl.load(layer), WEIGHT)
    w_at = weight + (head * (NOPE + V) + NOPE + columns)[:, None] * LATENT + depths[None, :]
    a_at = attended + (heads * LATENT)[:, None] + depths[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, LATENT, BLOCK_K):
        a = tl.load(a_at, present[:, None], other=0.0)
        total = tl.dot(a, tl.trans(tl.load(w_at)), total, input_precision="ieee")
        a_at += BLOCK_K
        w_at += BLOCK_K
    at = out + (heads * V)[:, None] + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), present[:, None])
