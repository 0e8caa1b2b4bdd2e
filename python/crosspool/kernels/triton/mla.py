"""Multi-head latent attention's rows before and after attention, in the absorbed form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton import cache
from crosspool.kernels.triton.batch import DeviceBatch, RopeTable, pair_places, rotated, row_slot
from crosspool.kernels.triton.cache import cache_at
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
    """Appends to the cache what it keeps of each row: the normed latent, then the rotated rope key.

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
        cache.address_of(kv),
        kv.shape[1],
        eps,
        LATENT=latent,
        HALF=rope.dim // 2,
        INTERLEAVED=rope.interleaved,
        WEIGHT=tl_dtype(norm.dtype),
        KV=tl_dtype(kv.dtype),
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
    [bucket, heads, latent + rope.dim]. Raises ValueError when latent or nope is no multiple of
    16."""
    bucket, heads, _ = plain.shape
    rows, latent = kv_b.shape
    block_m = _rows(bucket)
    block_n = depth_block(latent, 64)
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
    [bucket, heads, v], V_h the rows of head h in ``kv_b`` that follow its K_h. Raises ValueError
    when latent or v is no multiple of 16."""
    bucket, heads, latent = attended.shape
    v = out.shape[2]
    block_m = _rows(bucket)
    block_n = depth_block(v, 16 if bucket <= 64 else 64)
    _mla_values_kernel[(heads, v // block_n, triton.cdiv(bucket, block_m))](
        attended,
        kv_b.pointers,
        batch.count,
        layer,
        out,
        HEADS=heads,
        NOPE=nope,
        LATENT=latent,
        HEAD_ROWS=nope + v,
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
    kv: tl.int64,
    layers: tl.tensor,
    eps: tl.tensor,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHT: tl.constexpr,
    KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
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
        LATENT + 2 * HALF,
    )
    line = compressed + row.to(tl.int64) * stride
    i = tl.arange(0, BLOCK)
    latent = tl.load(line + i, i < LATENT, other=0.0).to(tl.float32)
    weight = tl.load(pointer_at(norms, index, WEIGHT) + i, i < LATENT, other=0.0).to(tl.float32)
    latent *= tl.rsqrt(tl.sum(latent * latent, 0) / LATENT + eps) * weight
    tl.store(slot + i, latent.to(KV), i < LATENT)

    pairs = tl.arange(0, HALF_BLOCK)
    inside = pairs < HALF
    first, second = _rotated_at(
        line + LATENT, position, cosines, sines, pairs, inside, HALF, INTERLEAVED
    )
    tl.store(slot + LATENT + pairs, first.to(KV), inside)
    tl.store(slot + LATENT + HALF + pairs, second.to(KV), inside)


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
        w_at = pointer_at(weights, tl.load(layer), WEIGHT) + head * HEAD_ROWS * LATENT + columns
        total = _product(from_at, w_at, present, NOPE, LATENT, BLOCK_M, BLOCK_N, BLOCK_K)
        tl.store(to_at + columns[None, :], total.to(q.dtype.element_ty), present[:, None])
    else:  # the last program of a head rotates
        pairs = tl.arange(0, HALF_BLOCK)[None, :]
        inside = present[:, None] & (pairs < HALF)
        position = tl.load(positions + rows, present, other=0)[:, None]
        first, second = _rotated_at(
            from_at + NOPE, position, cosines, sines, pairs, inside, HALF, INTERLEAVED
        )
        tl.store(to_at + LATENT + pairs, first.to(q.dtype.element_ty), inside)
        tl.store(to_at + LATENT + HALF + pairs, second.to(q.dtype.element_ty), inside)


@triton.jit
def _mla_values_kernel(
    attended: tl.tensor,
    weights: tl.tensor,
    count: tl.tensor,
    layer: tl.tensor,
    out: tl.tensor,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    LATENT: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
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
    weight = pointer_at(weights, tl.load(layer), WEIGHT)
    w_at = weight + (head * HEAD_ROWS + NOPE + columns) * LATENT
    from_at = attended + (heads * LATENT)[:, None]
    total = _product(from_at, w_at, present, LATENT, 1, BLOCK_M, BLOCK_N, BLOCK_K)
    at = out + (heads * (HEAD_ROWS - NOPE))[:, None] + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), present[:, None])


@triton.jit
def _product(
    a_at: tl.tensor,
    w_at: tl.tensor,
    present: tl.tensor,
    DEPTH: tl.constexpr,
    DEPTH_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Multiplies rows at ``a_at`` [BLOCK_M, 1], where ``present``, by the columns at ``w_at``
    [BLOCK_N], whose depths lie DEPTH_STRIDE elements apart; returns float32 [BLOCK_M, BLOCK_N]."""
    depths = tl.arange(0, BLOCK_K)
    a_at += depths[None, :]
    w_at = w_at[None, :] + (depths * DEPTH_STRIDE)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, DEPTH, BLOCK_K):
        a = tl.load(a_at, present[:, None], other=0.0)
        total = tl.dot(a, tl.load(w_at), total, input_precision="ieee")
        a_at += BLOCK_K
        w_at += BLOCK_K * DEPTH_STRIDE
    return total


@triton.jit
def _rotated_at(
    at: tl.tensor,
    position: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    pairs: tl.tensor,
    inside: tl.tensor,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rotates what lies at ``at`` to its ``position``; returns the two halves, float32."""
    first_at, second_at = pair_places(pairs, HALF, INTERLEAVED)
    first = tl.load(at + first_at, inside, other=0.0).to(tl.float32)
    second = tl.load(at + second_at, inside, other=0.0).to(tl.float32)
    return rotated(first, second, cosines, sines, position, pairs, inside, HALF)
