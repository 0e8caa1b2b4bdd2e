"""Causal attention over the paged cache, for GQA and for absorbed MLA.

There are two ways: rows one by one with the keys split among programs (decode), and blocks of rows
of one sequence that share the keys they read (prefill). Slots that a sequence has not written may
hold anything that another model left there, NaN included, and never enter a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from crosspool.kernels.triton import cache
from crosspool.kernels.triton.attention_decode import decode_kernel, merge_kernel
from crosspool.kernels.triton.attention_prefill import prefill_kernel
from crosspool.kernels.triton.batch import DeviceBatch
from crosspool.kernels.triton.memory import Memory
from crosspool.kernels.triton.tables import tl_dtype
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
        cls, bucket: int, q_heads: int, kv_heads: int, v_dim: int, memory: Memory
    ) -> AttentionWorkspace:
        """Splits keys into enough parts to keep the device busy with ``bucket`` rows."""
        blocks = triton.cdiv(q_heads // kv_heads, _heads_block(q_heads // kv_heads))
        splits = triton.cdiv(2 * MULTIPROCESSORS, bucket * kv_heads * blocks)
        splits = min(_MOST_SPLITS, splits)
        return cls(
            out=memory.take(torch.float32, bucket, q_heads, splits, v_dim),
            lse=memory.take(torch.float32, bucket, q_heads, splits),
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
    """Attends with ``q`` [bucket, q_heads, qk_dim] to the cached keys of each row's sequence, up to
    the row's own position, whose KV is already in ``kv`` [pages, layers, page_size, kv_width].
    Writes ``out`` [bucket, q_heads, v_dim], v_dim <= qk_dim.

    KV head h has its keys at h * qk_dim of a slot. Its values lie behind all keys (GQA:
    kv_width = 2 * kv_heads * qk_dim) or are the first v_dim of the key itself (MLA, absorbed:
    kv_heads = 1, kv_width = qk_dim). ``window``: tokens that a query sees, itself included.

    ``mixed``: False sends every row the decode way, which is right for any batch; each row reads
    its keys itself. True sends sequences with more than one row the prefill way, at the cost of a
    third kernel. The capture chooses, not the step."""
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
        "KV": tl_dtype(kv.dtype),
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
        cache.address_of(kv),
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
    decode_kernel[(splits, kv_heads * blocks, bucket)](
        *arrays,
        workspace.out,
        workspace.lse,
        **shape,
        SPLITS=splits,
        BLOCK_H=block_h,
        num_warps=8 if v_dim > 256 or q.dtype == torch.float32 else 4,
        num_stages=2 if q.dtype == torch.float32 else 3 if v_dim > 256 else 4,
    )
    merge_kernel[(q_heads, bucket)](
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
    prefill_kernel[(triton.cdiv(bucket, rows), kv_heads * triton.cdiv(group, block_h))](
        *arrays,
        out,
        **shape,
        BLOCK_ROWS=rows,
        BLOCK_H=block_h,
        num_warps=8,
        num_stages=2,
    )


def _heads_block(group: int) -> int:
    """Number of q heads of one KV head that a decode program takes; they share the keys it
    reads."""
    return 16 if group <= 16 else 32


def _keys_block(qk_dim: int, dtype: torch.dtype) -> int:
    """Number of keys that a program takes at a time; splits are multiples of it."""
    return 32 if qk_dim > 256 or dtype == torch.float32 else 64
