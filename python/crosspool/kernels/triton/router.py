"""The router's choice of experts."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.order import ordered
from crosspool.kernels.triton.tables import TensorTable, pointer_at


def route(
    logits: torch.Tensor,
    bias: TensorTable | None,
    layer: torch.Tensor,
    count: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    *,
    score: Literal["softmax", "sigmoid"],
    groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["max", "top2_sum"] = "max",
    renormalize: bool = False,
    scale: float = 1.0,
) -> None:
    """Chooses the experts of every row, best first, and their weights: ``experts`` int32 and
    ``weights`` float32 [bucket, top_k], from ``logits`` [bucket, experts] (what
    :func:`~crosspool.kernels.triton.linear.linear` made of the router's weight; float32 or the
    model's dtype).

    The rules are those of :class:`crosspool.models.spec.RouterSpec`. ``bias``: float32 table of
    [experts], moves the choice only. Among equals the lower index wins; a NaN counts as larger
    than any number."""
    bucket, top_k = experts.shape
    size = logits.shape[1] // groups
    _route_kernel[(bucket,)](
        logits,
        None if bias is None else bias.pointers,
        layer,
        count,
        experts,
        weights,
        scale,
        GROUPS=groups,
        SIZE=size,
        TOP_K=top_k,
        TOP_GROUPS=top_groups,
        SIGMOID=score == "sigmoid",
        TOP2_SUM=group_score == "top2_sum",
        RENORMALIZE=renormalize,
        GROUP_BLOCK=triton.next_power_of_2(groups),
        SIZE_BLOCK=triton.next_power_of_2(size),
        CHOICE_BLOCK=triton.next_power_of_2(top_k),
        num_warps=1,
    )


@triton.jit
def _route_kernel(
    logits: tl.tensor,
    biases: tl.tensor,  # or None
    layer: tl.tensor,
    count: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    CHOICE_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    g = tl.arange(0, GROUP_BLOCK)
    j = tl.arange(0, SIZE_BLOCK)
    expert = g[:, None] * SIZE + j[None, :]
    inside = (g < GROUPS)[:, None] & (j < SIZE)[None, :]
    at = logits + row.to(tl.int64) * (GROUPS * SIZE) + expert
    x = tl.load(at, inside, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        scores = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    choice = scores
    if biases is not None:
        choice += tl.load(
            pointer_at(biases, tl.load(layer), tl.float32) + expert, inside, other=0.0
        )
    LEAST: tl.constexpr = -0x7FFFFFFF - 1  # below every key
    keys = tl.where(inside, ordered(choice), LEAST)
    if GROUPS > 1:
        best = tl.max(keys, 1)
        at_best = tl.min(tl.where(keys == best[:, None], j[None, :], SIZE), 1)
        is_best = j[None, :] == at_best[:, None]
        group_scores = tl.sum(tl.where(is_best, choice, 0.0), 1)
        if TOP2_SUM:
            others = tl.where(is_best | (inside == 0) | (choice != choice), float("-inf"), choice)
            group_scores += tl.max(others, 1)
        group_keys = tl.where(g < GROUPS, ordered(group_scores), LEAST)
        kept = g < 0
        for _ in tl.static_range(TOP_GROUPS):
            left = tl.where(kept, LEAST, group_keys)
            top = tl.min(tl.where(left == tl.max(left, 0), g, GROUP_BLOCK), 0)
            kept = kept | (g == top)
        keys = tl.where(kept[:, None], keys, LEAST)
    choices = tl.arange(0, CHOICE_BLOCK)
    chosen = tl.zeros([CHOICE_BLOCK], tl.int32)
    chosen_scores = tl.zeros([CHOICE_BLOCK], tl.float32)
    total = 0.0
    for i in tl.static_range(TOP_K):
        highest = tl.max(tl.max(keys, 1), 0)
        top = tl.min(tl.min(tl.where(keys == highest, expert, GROUPS * SIZE_BLOCK), 1), 0)
        value = tl.sum(tl.sum(tl.where(expert == top, tl.where(inside, scores, 0.0), 0.0), 1), 0)
        keys = tl.where((expert == top) & inside, LEAST, keys)
        chosen = tl.where(choices == i, top, chosen)
        chosen_scores = tl.where(choices == i, value, chosen_scores)
        total += value
    if RENORMALIZE:
        if SIGMOID:  # all of the chosen may be zero; the largest values of a softmax cannot
            total += 1e-20
        chosen_scores = chosen_scores / total
    to = row.to(tl.int64) * TOP_K + choices
    tl.store(experts + to, chosen, choices < TOP_K)
    tl.store(weights + to, chosen_scores * scale, choices < TOP_K)
