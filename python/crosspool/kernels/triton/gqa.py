"""Grouped-query attention's rows between projection and attention."""

from __future__ import annotations

import torch

from crosspool.kernels.triton.batch import DeviceBatch, RopeTable
from crosspool.kernels.triton.tables import TensorTable


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
    [q_heads * head_dim] and [kv_heads * head_dim] all heads at once; None: no norm. ``rope.dim``
    is head_dim."""
    raise NotImplementedError
