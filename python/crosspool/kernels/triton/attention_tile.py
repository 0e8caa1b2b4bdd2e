"""A tile of queries of one KV head against a range of one sequence's keys."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.batch import kv_slot


@triton.jit
def attend_keys(
    q_at: tl.tensor,
    wanted: tl.tensor,
    limits: tl.tensor,
    kv: tl.tensor,
    line: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    kv_head: tl.tensor,
    scale: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    KV_HEADS: tl.constexpr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SHARED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds keys [first, last) of the sequence whose pages are on ``line`` to a running softmax:
    ``highest`` and ``total`` [M] and ``result`` [M, BLOCK_D], the weighted values, in powers of 2
    (``scale`` includes log2 e).

    Query m [QK_DIM] lies at ``q_at[m]`` where ``wanted``, and sees keys up to position
    ``limits[m]``; the sums of a query that sees no key stay as they are. The first BLOCK_D features
    of a key and its last BLOCK_R (those past V_DIM, MLA's rope) are read separately."""
    d = tl.arange(0, BLOCK_D)
    q_main = tl.load(q_at[:, None] + d[None, :], wanted[:, None] & (d < V_DIM)[None, :], other=0.0)
    if BLOCK_R > 0:
        r = tl.arange(0, BLOCK_R)
        is_rest = r < QK_DIM - V_DIM
        q_rest = tl.load(
            q_at[:, None] + V_DIM + r[None, :], wanted[:, None] & is_rest[None, :], other=0.0
        )
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < last
        slot = kv_slot(kv, line, keys, layer, layers, inside, PAGE_SIZE, KV_WIDTH)
        k_at = slot + kv_head * QK_DIM
        mask = inside[:, None] & (d < V_DIM)[None, :]
        k_main = tl.load(k_at[:, None] + d[None, :], mask, other=0.0)
        scores = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
        if BLOCK_R > 0:
            k_rest = tl.load(
                k_at[:, None] + V_DIM + r[None, :], inside[:, None] & is_rest[None, :], other=0.0
            )
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        sees = inside[None, :] & (keys[None, :] <= limits[:, None])
        if WINDOW > 0:
            sees = sees & (keys[None, :] > limits[:, None] - WINDOW)
        scores = tl.where(sees, scores * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        before = tl.exp2(highest - base)
        total = total * before + tl.sum(weights, 1)
        if SHARED:
            v = k_main
        else:
            v_at = slot + KV_HEADS * QK_DIM + kv_head * V_DIM
            v = tl.load(v_at[:, None] + d[None, :], mask, other=0.0)
        result = tl.dot(weights.to(v.dtype), v, result * before[:, None], input_precision="ieee")
        highest = higher
    return highest, total, result


@triton.jit
def store_heads(
    at: tl.tensor, wanted: tl.tensor, values: tl.tensor, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr
) -> None:
    """Stores row m of ``values`` [M, BLOCK_D] at ``at[m]``, where ``wanted``."""
    d = tl.arange(0, BLOCK_D)
    mask = wanted[:, None] & (d < V_DIM)[None, :]
    tl.store(at[:, None] + d[None, :], values.to(at.dtype.element_ty), mask)
