"""The rows of a batch grouped by expert.

A group is up to ``block`` rows that go through one gated MLP. In a bucket of up to FEW_ROWS rows
there is one group for each chosen expert, in which every row of the bucket has its place; rows that
did not choose the expert are marked. In larger buckets rows are sorted by expert, and an expert has
as many groups as it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.memory import Memory
from crosspool.kernels.triton.tiles import FEW_ROWS

_SORTED_BLOCK = 64
_PAIRS_BLOCK = 1024


@dataclass(frozen=True)
class ExpertPlan:
    """The plan that :func:`plan_experts` makes; int32 unless said. The MLP that every row takes
    (the shared expert, or a dense layer's only one) counts as expert ``held``; its groups come
    last."""

    group_expert: torch.Tensor
    """[groups]: the expert of each group, counted from the first one held; ascending."""
    group_count: torch.Tensor
    """[1]: number of groups."""
    slot_weight: torch.Tensor
    """float32 [groups, block], for few rows: each row's weight; negative where it did not choose
    the expert. Empty for many rows."""
    slot_pair: torch.Tensor
    """[groups, block], for many rows: row * choices + choice of each slot, where the MLP of every
    row is the last choice; -1 where the slot is empty. Empty for few rows."""
    expert_counts: torch.Tensor
    """[held], for many rows: workspace. Empty for few rows."""
    block: int
    """Rows of a group."""
    top_k: int
    held: int
    shared: bool
    few: bool

    @property
    def groups(self) -> int:
        """Most groups that there can be."""
        return self.group_expert.shape[0]

    @property
    def choices(self) -> int:
        return self.top_k + self.shared

    @classmethod
    def allocate(
        cls, bucket: int, top_k: int, held: int, shared: bool, memory: Memory
    ) -> ExpertPlan:
        """``held``: routed experts on this rank (0 in a dense layer, with top_k 0); ``shared``:
        whether there is a MLP that every row takes."""
        few = bucket <= FEW_ROWS
        pairs = bucket * top_k
        if few:
            block, groups = FEW_ROWS, min(held, pairs) + shared
        else:
            block = _SORTED_BLOCK if pairs > 2 * FEW_ROWS * max(held, 1) else FEW_ROWS
            block = _SORTED_BLOCK if held == 0 else block
            groups = min(pairs, pairs // block + held) + shared * triton.cdiv(bucket, block)
        slots, nothing = (groups, block), (0,)
        return cls(
            group_expert=memory.take(torch.int32, groups),
            group_count=memory.take(torch.int32, 1),
            slot_weight=memory.take(torch.float32, *(slots if few else nothing)),
            slot_pair=memory.take(torch.int32, *(nothing if few else slots)),
            expert_counts=memory.take(torch.int32, 0 if few else held),
            block=block,
            top_k=top_k,
            held=held,
            shared=shared,
            few=few,
        )


def plan_experts(
    experts: torch.Tensor | None,
    weights: torch.Tensor | None,
    count: torch.Tensor,
    bucket: int,
    plan: ExpertPlan,
    *,
    first_expert: int = 0,
) -> None:
    """Sorts a batch by expert; ``experts`` and ``weights`` [bucket, top_k] as from
    :func:`~crosspool.kernels.triton.router.route`, None in a dense layer. Experts outside
    first_expert .. first_expert + held are another rank's."""
    held_block = triton.next_power_of_2(plan.held + 1)
    if plan.few:
        _few_kernel[(1,)](
            experts,
            weights,
            count,
            plan.group_expert,
            plan.group_count,
            plan.slot_weight,
            first_expert,
            BUCKET=bucket,
            TOP_K=plan.top_k,
            HELD=plan.held,
            SHARED=plan.shared,
            BLOCK=plan.block,
            HELD_BLOCK=held_block,
            CHOICE_BLOCK=triton.next_power_of_2(max(plan.top_k, 1)),
            num_warps=4,
        )
        return
    sizes = {
        "TOP_K": plan.top_k,
        "CHOICES": plan.choices,
        "HELD": plan.held,
        "PAIRS_BLOCK": _PAIRS_BLOCK,
    }
    if plan.held:
        _count_kernel[(plan.held,)](
            experts, count, plan.expert_counts, first_expert, **sizes, num_warps=4
        )
    _place_kernel[(plan.held + plan.shared,)](
        experts,
        count,
        plan.expert_counts,
        plan.group_expert,
        plan.group_count,
        plan.slot_pair,
        first_expert,
        **sizes,
        SHARED=plan.shared,
        BLOCK=plan.block,
        HELD_BLOCK=held_block,
        num_warps=4,
    )


@triton.jit
def _few_kernel(
    experts: tl.tensor,
    weights: tl.tensor,
    count: tl.tensor,
    group_expert: tl.tensor,
    group_count: tl.tensor,
    slot_weight: tl.tensor,
    first_expert: tl.tensor,
    BUCKET: tl.constexpr,
    TOP_K: tl.constexpr,
    HELD: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD_BLOCK: tl.constexpr,
    CHOICE_BLOCK: tl.constexpr,
) -> None:
    rows = tl.load(count)
    e = tl.arange(0, HELD_BLOCK)
    choices = tl.arange(0, CHOICE_BLOCK)
    # No row: no weights are read, which the layer may not have while stages are warmed up.
    taken = (e == HELD) & (rows > 0) if SHARED else (e < 0)
    if TOP_K > 0:
        for row in range(BUCKET):
            is_choice = (choices < TOP_K) & (row < rows)
            chosen = tl.load(experts + row * TOP_K + choices, is_choice, other=-1) - first_expert
            match = is_choice[:, None] & (chosen[:, None] == e[None, :]) & (e < HELD)[None, :]
            taken = taken | (tl.max(match.to(tl.int32), 0) > 0)
    group = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(group_expert + group, e, taken)
    tl.store(group_count, tl.sum(taken.to(tl.int32), 0))
    for row in range(BUCKET):
        weight = tl.full([HELD_BLOCK], -1.0, tl.float32)
        if TOP_K > 0:
            is_choice = (choices < TOP_K) & (row < rows)
            chosen = tl.load(experts + row * TOP_K + choices, is_choice, other=-1) - first_expert
            share = tl.load(weights + row * TOP_K + choices, is_choice, other=0.0)
            match = is_choice[:, None] & (chosen[:, None] == e[None, :])
            own = tl.sum(tl.where(match, share[:, None], 0.0), 0)
            weight = tl.where(tl.max(match.to(tl.int32), 0) > 0, own, weight)
        weight = tl.where((e == HELD) & (row < rows), 1.0, weight)
        tl.store(slot_weight + group * BLOCK + row, weight, taken)
    if BUCKET < BLOCK:
        spare = tl.arange(0, BLOCK)
        at = slot_weight + group[:, None] * BLOCK + spare[None, :]
        weight = tl.full([HELD_BLOCK, BLOCK], -1.0, tl.float32)
        tl.store(at, weight, taken[:, None] & (spare >= BUCKET)[None, :])


@triton.jit
def _count_kernel(
    experts: tl.tensor,
    count: tl.tensor,
    expert_counts: tl.tensor,
    first_expert: tl.tensor,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    HELD: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    pairs = tl.load(count) * TOP_K
    found = tl.zeros([PAIRS_BLOCK], tl.int32)
    for start in range(0, pairs, PAIRS_BLOCK):
        p = start + tl.arange(0, PAIRS_BLOCK)
        chosen = tl.load(experts + p, p < pairs, other=-1) - first_expert
        found += ((p < pairs) & (chosen == expert)).to(tl.int32)
    tl.store(expert_counts + expert, tl.sum(found, 0))


@triton.jit
def _place_kernel(
    experts: tl.tensor,
    count: tl.tensor,
    expert_counts: tl.tensor,
    group_expert: tl.tensor,
    group_count: tl.tensor,
    slot_pair: tl.tensor,
    first_expert: tl.tensor,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    HELD: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD_BLOCK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    rows = tl.load(count)
    e = tl.arange(0, HELD_BLOCK)
    counts = tl.load(expert_counts + e, e < HELD, other=0)
    if SHARED:
        counts = tl.where(e == HELD, rows, counts)
    groups = tl.cdiv(counts, BLOCK)
    first_group = tl.sum(tl.where(e < expert, groups, 0), 0)
    own_groups = tl.sum(tl.where(e == expert, groups, 0), 0)
    own = tl.sum(tl.where(e == expert, counts, 0), 0)
    if expert == 0:
        tl.store(group_count, tl.sum(groups, 0))
    for i in range(0, own_groups):
        tl.store(group_expert + first_group + i, expert)
    first_slot = first_group * BLOCK
    b = tl.arange(0, BLOCK)
    if own_groups > 0:  # the last group may have slots to spare
        last = (own_groups - 1) * BLOCK + b
        tl.store(slot_pair + first_slot + last, -1, last >= own)
    p = tl.arange(0, PAIRS_BLOCK)
    if expert == HELD:
        for start in range(0, rows, PAIRS_BLOCK):
            row = start + p
            tl.store(slot_pair + first_slot + row, row * CHOICES + TOP_K, row < rows)
    elif TOP_K > 0:
        placed = 0
        for start in range(0, rows * TOP_K, PAIRS_BLOCK):
            at = start + p
            inside = at < rows * TOP_K
            match = inside & (tl.load(experts + at, inside, other=-1) - first_expert == expert)
            ranks = placed + tl.cumsum(match.to(tl.int32), 0) - 1
            pair = at // TOP_K * CHOICES + at % TOP_K
            tl.store(slot_pair + first_slot + ranks, pair, match)
            placed += tl.sum(match.to(tl.int32), 0)
