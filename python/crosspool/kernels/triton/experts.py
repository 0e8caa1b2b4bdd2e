"""Gated MLPs: the routed experts, the shared expert, a dense layer's only one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.expert_plan import ExpertPlan
from crosspool.kernels.triton.tables import TensorTable, pointer_at, tl_dtype
from crosspool.kernels.triton.tiles import depth_block, product_tile

_CHUNK = 768
"""Depths of a down matrix that one program takes where rows are few: short enough that a chosen
expert keeps every multiprocessor busy, a multiple of every depth block."""
_SUM_BLOCK = 8


@dataclass(frozen=True)
class FFNWeights:
    """A model's MLPs on one rank, all of one dtype. Routed experts and the shared one may differ
    in width; widths and hidden are multiples of 16.

    A model with dense and MoE layers has one of these for each kind of layer."""

    gate_up: TensorTable | None
    """[layers, held] tables of [2 * I, hidden], gate first; None: no routed experts."""
    down: TensorTable | None
    """[layers, held] tables of [hidden, I]."""
    shared_gate_up: TensorTable | None
    """[layers] table of [2 * S, hidden]: the shared expert's, or a dense layer's."""
    shared_down: TensorTable | None

    @property
    def width(self) -> int:
        """Of a routed expert; 0: there are none."""
        return 0 if self.down is None else self.down.shape[1]

    @property
    def shared_width(self) -> int:
        return 0 if self.shared_down is None else self.shared_down.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        table = self.down if self.shared_down is None else self.shared_down
        if table is None:
            raise ValueError("a FFN part needs routed experts, a shared one, or both")
        return table.dtype


@dataclass(frozen=True)
class FFNWorkspace:
    """Activations between the two products; one serves all layers of a lane."""

    activation: torch.Tensor
    """Model dtype [groups * block, width], times their rows' weights."""
    partials: torch.Tensor
    """float32 [*, bucket, hidden]: what is summed up, by chunk of a group (few rows) or by choice
    (many)."""
    arrivals: torch.Tensor
    """int32, zero between products: few rows."""

    @classmethod
    def allocate(
        cls, bucket: int, hidden: int, weights: FFNWeights, plan: ExpertPlan
    ) -> FFNWorkspace:
        device = plan.group_expert.device
        slots = plan.groups * plan.block
        width = max(weights.width, weights.shared_width)
        parts = plan.groups * triton.cdiv(width, _CHUNK) if plan.few else plan.choices
        return cls(
            activation=torch.empty(slots, width, dtype=weights.dtype, device=device),
            partials=torch.empty(parts, bucket, hidden, dtype=torch.float32, device=device),
            arrivals=torch.zeros(hidden // 16, dtype=torch.int32, device=device),
        )


def gated_mlps(
    x: torch.Tensor,
    weights: FFNWeights,
    layer: torch.Tensor,
    count: torch.Tensor,
    plan: ExpertPlan,
    routed: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    workspace: FFNWorkspace,
    *,
    first_expert: int = 0,
) -> None:
    """out[row] = sum over its experts here of weight * down(silu(gate(x[row])) * up(x[row])), plus
    the shared expert's with weight 1; rows none of whose experts lie here become zero.

    ``x`` [bucket, hidden] of the model's dtype; ``plan`` as :func:`~.expert_plan.plan_experts`
    made it from ``routed`` (experts, weights; None in a dense layer); ``out`` [bucket, hidden],
    float32 or the model's dtype. The order of the sum does not depend on the device's timing."""
    bucket, hidden = x.shape
    width, shared_width = weights.width, weights.shared_width
    widest = max(width, shared_width)
    tables = [
        None if table is None else table.pointers
        for table in (weights.gate_up, weights.shared_gate_up, weights.down, weights.shared_down)
    ]
    sizes = {
        "HIDDEN": hidden,
        "WIDTH": width,
        "SHARED_WIDTH": shared_width,
        "STRIDE": widest,
        "HELD": plan.held,
        "CHOICES": plan.choices,
        "FEW": plan.few,
        "WEIGHT": tl_dtype(weights.dtype),
        "BLOCK_M": plan.block,
    }
    tile = product_tile(plan.block, widest, hidden, weights.dtype, matrices=2)
    columns = min(tile.columns, _common_block(width, shared_width))
    _gate_up_kernel[(triton.cdiv(widest, columns), plan.groups)](
        x,
        tables[0],
        tables[1],
        layer,
        plan.group_expert,
        plan.group_count,
        plan.slot_weight,
        plan.slot_pair,
        None if routed is None else routed[1],
        count,
        workspace.activation,
        **sizes,
        TOP_K=plan.top_k,
        BLOCK_N=columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    tile = product_tile(plan.block, hidden, _common_block(width, shared_width), weights.dtype)
    block_n = min(tile.columns, depth_block(hidden))
    blocks = {"BLOCK_N": block_n, "BLOCK_K": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if plan.few:
        _down_few_kernel[(hidden // block_n, plan.groups, triton.cdiv(widest, _CHUNK))](
            workspace.activation,
            tables[2],
            tables[3],
            layer,
            plan.group_expert,
            plan.group_count,
            plan.slot_weight,
            count,
            workspace.partials,
            workspace.arrivals,
            out,
            **sizes,
            **blocks,
            BUCKET=bucket,
            CHUNK=_CHUNK,
            SUM_BLOCK=_SUM_BLOCK,
            **options,
        )
        return
    _down_kernel[(hidden // block_n, plan.groups)](
        workspace.activation,
        tables[2],
        tables[3],
        layer,
        plan.group_expert,
        plan.group_count,
        plan.slot_pair,
        workspace.partials,
        **sizes,
        **blocks,
        **options,
    )
    _sum_kernel[(bucket,)](
        workspace.partials,
        None if routed is None else routed[0],
        count,
        out,
        first_expert,
        HIDDEN=hidden,
        HELD=plan.held,
        TOP_K=plan.top_k,
        CHOICES=plan.choices,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=4,
    )


def _common_block(width: int, shared_width: int) -> int:
    """A depth that divides both widths, of which one may be 0."""
    return min(depth_block(w) for w in (width, shared_width) if w)


@triton.jit
def _matrix(
    tables: tl.tensor,  # or None
    shared_tables: tl.tensor,  # or None
    layer: tl.tensor,
    expert: tl.tensor,
    HELD: tl.constexpr,
    WEIGHT: tl.constexpr,
) -> tl.tensor:
    if HELD == 0:
        entry = shared_tables + layer
    else:
        entry = tables + (layer * HELD + expert)
        if shared_tables is not None:
            entry = shared_tables + layer if expert == HELD else entry
    return pointer_at(entry, 0, WEIGHT)


@triton.jit
def _gate_up_kernel(
    x: tl.tensor,
    gate_ups: tl.tensor,
    shared_gate_ups: tl.tensor,
    layer: tl.tensor,
    group_expert: tl.tensor,
    group_count: tl.tensor,
    slot_weight: tl.tensor,
    slot_pair: tl.tensor,
    row_weights: tl.tensor,  # or None
    count: tl.tensor,
    activation: tl.tensor,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    CHOICES: tl.constexpr,
    FEW: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    group = tl.program_id(1)
    if group >= tl.load(group_count):
        return
    expert = tl.load(group_expert + group)
    width = tl.where(expert == HELD, SHARED_WIDTH, WIDTH)
    if tl.program_id(0) * BLOCK_N >= width:
        return
    m = tl.arange(0, BLOCK_M)
    if FEW:
        rows = m
        present = m < tl.load(count)
        weight = tl.load(slot_weight + group * BLOCK_M + m)
        chosen = (weight < 0) == 0  # a NaN was chosen
    else:
        pair = tl.load(slot_pair + group * BLOCK_M + m)
        present = pair >= 0
        chosen = present
        rows = tl.where(present, pair // CHOICES, 0)
        choice = pair % CHOICES
        weight = tl.full([BLOCK_M], 1.0, tl.float32)
        if TOP_K > 0:
            is_routed = present & (choice < TOP_K)
            weight = tl.load(row_weights + rows * TOP_K + choice, is_routed, other=1.0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    depths = tl.arange(0, BLOCK_K)
    matrix = _matrix(gate_ups, shared_gate_ups, tl.load(layer), expert, HELD, WEIGHT)
    x_at = x + rows.to(tl.int64)[:, None] * HIDDEN + depths[None, :]
    gate_at = matrix + columns.to(tl.int64)[:, None] * HIDDEN + depths[None, :]
    up_at = gate_at + width.to(tl.int64) * HIDDEN
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, HIDDEN, BLOCK_K):
        a = tl.load(x_at, present[:, None], other=0.0)
        gate = tl.dot(a, tl.trans(tl.load(gate_at)), gate, input_precision="ieee")
        up = tl.dot(a, tl.trans(tl.load(up_at)), up, input_precision="ieee")
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K
    value = gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]
    value = tl.where(chosen[:, None], value, 0.0)
    to = activation + (group * BLOCK_M + m).to(tl.int64)[:, None] * STRIDE + columns[None, :]
    tl.store(to, value.to(WEIGHT))


@triton.jit
def _down_few_kernel(
    activation: tl.tensor,
    downs: tl.tensor,
    shared_downs: tl.tensor,
    layer: tl.tensor,
    group_expert: tl.tensor,
    group_count: tl.tensor,
    slot_weight: tl.tensor,
    count: tl.tensor,
    partials: tl.tensor,
    arrivals: tl.tensor,
    out: tl.tensor,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    CHOICES: tl.constexpr,
    FEW: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BUCKET: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
) -> None:
    """Some columns of a chunk of one group's product; the last program to arrive adds them all, in
    the order of groups and chunks."""
    group = tl.program_id(1)
    chunk = tl.program_id(2)
    groups = tl.load(group_count)
    m = tl.arange(0, BLOCK_M)
    present = m < tl.load(count)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    to = out + m[:, None] * HIDDEN + columns[None, :]
    if (groups == 0) & (group == 0) & (chunk == 0):  # none of the chosen experts lies here
        tl.store(to, tl.zeros([BLOCK_M, BLOCK_N], out.dtype.element_ty), present[:, None])
    if group >= groups:
        return
    expert = tl.load(group_expert + group)
    width = tl.where(expert == HELD, SHARED_WIDTH, WIDTH)
    begin = chunk * CHUNK
    if begin >= width:
        return
    depths = begin + tl.arange(0, BLOCK_K)
    matrix = _matrix(downs, shared_downs, tl.load(layer), expert, HELD, WEIGHT)
    a_at = activation + (group * BLOCK_M + m).to(tl.int64)[:, None] * STRIDE + depths[None, :]
    row_stride = tl.multiple_of(width.to(tl.int64), 16)
    w_at = matrix + columns[:, None] * row_stride + depths[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(begin, tl.minimum(begin + CHUNK, width), BLOCK_K):
        total = tl.dot(tl.load(a_at), tl.trans(tl.load(w_at)), total, input_precision="ieee")
        a_at += BLOCK_K
        w_at += BLOCK_K
    CHUNKS: tl.constexpr = (STRIDE + CHUNK - 1) // CHUNK
    OWN: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    SHARED: tl.constexpr = (SHARED_WIDTH + CHUNK - 1) // CHUNK
    if SHARED_WIDTH > 0:
        units = (groups - 1) * OWN + SHARED
    else:
        units = groups * OWN
    place = m[:, None] * HIDDEN + columns[None, :]
    unit = (group * CHUNKS + chunk).to(tl.int64)
    tl.store(partials + unit * (BUCKET * HIDDEN) + place, total, present[:, None])
    tl.debug_barrier()
    if tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel") == units - 1:
        tl.store(arrivals + tl.program_id(0), 0)
        whole = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, groups * CHUNKS, SUM_BLOCK):
            u = start + tl.arange(0, SUM_BLOCK)
            of = u // CHUNKS
            there = of < groups
            owner = tl.load(group_expert + of, there, other=-1)
            there = there & (u % CHUNKS < tl.where(owner == HELD, SHARED, OWN))
            weight = tl.load(
                slot_weight + of[:, None] * BLOCK_M + m[None, :], there[:, None], other=-1.0
            )
            mine = there[:, None] & present[None, :] & ((weight < 0) == 0)
            at = u.to(tl.int64)[:, None, None] * (BUCKET * HIDDEN) + place[None, :, :]
            part = tl.load(partials + at, mine[:, :, None], other=0.0, cache_modifier=".cg")
            whole += tl.sum(part, 0)
        tl.store(to, whole.to(out.dtype.element_ty), present[:, None])


@triton.jit
def _down_kernel(
    activation: tl.tensor,
    downs: tl.tensor,
    shared_downs: tl.tensor,
    layer: tl.tensor,
    group_expert: tl.tensor,
    group_count: tl.tensor,
    slot_pair: tl.tensor,
    pair_sums: tl.tensor,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    CHOICES: tl.constexpr,
    FEW: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    group = tl.program_id(1)
    if group >= tl.load(group_count):
        return
    expert = tl.load(group_expert + group)
    width = tl.where(expert == HELD, SHARED_WIDTH, WIDTH)
    m = tl.arange(0, BLOCK_M)
    pair = tl.load(slot_pair + group * BLOCK_M + m)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    depths = tl.arange(0, BLOCK_K)
    matrix = _matrix(downs, shared_downs, tl.load(layer), expert, HELD, WEIGHT)
    a_at = activation + (group * BLOCK_M + m).to(tl.int64)[:, None] * STRIDE + depths[None, :]
    row_stride = tl.multiple_of(width.to(tl.int64), 16)
    w_at = matrix + columns[:, None] * row_stride + depths[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        a = tl.load(a_at + k)
        w = tl.load(w_at + k)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    to = pair_sums + pair.to(tl.int64)[:, None] * HIDDEN + columns[None, :]
    tl.store(to, total, (pair >= 0)[:, None])


@triton.jit
def _sum_kernel(
    pair_sums: tl.tensor,
    experts: tl.tensor,  # or None
    count: tl.tensor,
    out: tl.tensor,
    first_expert: tl.tensor,
    HIDDEN: tl.constexpr,
    HELD: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(count):
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        here = inside
        if choice < TOP_K:
            expert = tl.load(experts + row * TOP_K + choice) - first_expert
            here = inside & (expert >= 0) & (expert < HELD)
        total += tl.load(pair_sums + (row * CHOICES + choice) * HIDDEN + columns, here, other=0.0)
    tl.store(out + row * HIDDEN + columns, total.to(out.dtype.element_ty), inside)
