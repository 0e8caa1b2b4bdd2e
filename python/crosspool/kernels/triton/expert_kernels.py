"""The products of gated MLPs, group by group of an expert plan."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.arrival import is_last_to_arrive
from crosspool.kernels.triton.tables import pointer_at


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
def gate_up_kernel(
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
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FEW: tl.constexpr,
    CHOICES: tl.constexpr,
    TOP_K: tl.constexpr,
) -> None:
    """Computes some columns of one group's activation from the products of gate and up, times the
    rows' weights; zero for rows that did not choose the expert."""
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
def _down_product(
    activation: tl.tensor,
    downs: tl.tensor,
    shared_downs: tl.tensor,
    layer: tl.tensor,
    group: tl.tensor,
    expert: tl.tensor,
    columns: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    width: tl.tensor,
    STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Multiplies a group's activations by columns of its expert's down matrix, over the depths
    [begin, end) of the expert's width; returns float32 [BLOCK_M, BLOCK_N]."""
    slots = (group * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    depths = begin + tl.arange(0, BLOCK_K)
    matrix = _matrix(downs, shared_downs, tl.load(layer), expert, HELD, WEIGHT)
    a_at = activation + slots[:, None] * STRIDE + depths[None, :]
    row_stride = tl.multiple_of(width.to(tl.int64), 16)
    w_at = matrix + columns[:, None] * row_stride + depths[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(begin, end, BLOCK_K):
        total = tl.dot(tl.load(a_at), tl.trans(tl.load(w_at)), total, input_precision="ieee")
        a_at += BLOCK_K
        w_at += BLOCK_K
    return total


@triton.jit
def down_few_kernel(
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
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BUCKET: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
) -> None:
    """Computes some columns of a chunk of one group's product; the last program to arrive adds them
    all, in the order of groups and chunks."""
    group = tl.program_id(1)
    chunk = tl.program_id(2)
    groups = tl.load(group_count)
    m = tl.arange(0, BLOCK_M)
    present = m < tl.load(count)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = m[:, None] * HIDDEN + columns[None, :]
    if (groups == 0) & (group == 0) & (chunk == 0):  # no chosen expert is on this rank
        zeros = tl.zeros([BLOCK_M, BLOCK_N], out.dtype.element_ty)
        tl.store(out + place, zeros, present[:, None])
    if group >= groups:
        return
    expert = tl.load(group_expert + group)
    width = tl.where(expert == HELD, SHARED_WIDTH, WIDTH)
    begin = chunk * CHUNK
    if begin >= width:
        return
    total = _down_product(
        activation,
        downs,
        shared_downs,
        layer,
        group,
        expert,
        columns,
        begin,
        tl.minimum(begin + CHUNK, width),
        width,
        STRIDE,
        HELD,
        WEIGHT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    CHUNKS: tl.constexpr = (STRIDE + CHUNK - 1) // CHUNK
    OWN: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    SHARED: tl.constexpr = (SHARED_WIDTH + CHUNK - 1) // CHUNK
    unit = (group * CHUNKS + chunk).to(tl.int64)
    tl.store(partials + unit * (BUCKET * HIDDEN) + place, total, present[:, None])
    units = groups * OWN
    if SHARED_WIDTH > 0:  # the last group's
        units += SHARED - OWN
    if not is_last_to_arrive(arrivals + tl.program_id(0), units):
        return
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, groups * CHUNKS, SUM_BLOCK):
        u = start + tl.arange(0, SUM_BLOCK)
        of = u // CHUNKS
        there = of < groups
        owner = tl.load(group_expert + of, there, other=-1)
        there = there & (u % CHUNKS < tl.where(owner == HELD, SHARED, OWN))
        at = slot_weight + of[:, None] * BLOCK_M + m[None, :]
        weight = tl.load(at, there[:, None], other=-1.0)
        mine = there[:, None] & present[None, :] & ((weight < 0) == 0)
        at = partials + u.to(tl.int64)[:, None, None] * (BUCKET * HIDDEN) + place[None, :, :]
        part = tl.load(at, mine[:, :, None], other=0.0, cache_modifier=".cg")
        total += tl.sum(part, 0)
    tl.store(out + place, total.to(out.dtype.element_ty), present[:, None])


@triton.jit
def down_kernel(
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
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Computes some columns of one group's product, into the place of each row's choice."""
    group = tl.program_id(1)
    if group >= tl.load(group_count):
        return
    expert = tl.load(group_expert + group)
    width = tl.where(expert == HELD, SHARED_WIDTH, WIDTH)
    pair = tl.load(slot_pair + group * BLOCK_M + tl.arange(0, BLOCK_M))
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _down_product(
        activation,
        downs,
        shared_downs,
        layer,
        group,
        expert,
        columns,
        0,
        width,
        width,
        STRIDE,
        HELD,
        WEIGHT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    to = pair_sums + pair.to(tl.int64)[:, None] * HIDDEN + columns[None, :]
    tl.store(to, total, (pair >= 0)[:, None])


@triton.jit
def sum_kernel(
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
