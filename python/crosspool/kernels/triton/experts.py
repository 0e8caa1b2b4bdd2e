"""Gated MLPs: routed experts, the shared expert, and the only MLP of a dense layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from crosspool.kernels.triton.expert_kernels import (
    down_few_kernel,
    down_kernel,
    gate_up_kernel,
    sum_kernel,
)
from crosspool.kernels.triton.expert_plan import ExpertPlan
from crosspool.kernels.triton.memory import Memory
from crosspool.kernels.triton.tables import TensorTable, tl_dtype
from crosspool.kernels.triton.tiles import depth_block, product_tile

_CHUNK = 768
"""Depths of a down matrix that one program takes where rows are few. It is short enough that one
chosen expert keeps every multiprocessor busy, and a multiple of every depth block."""
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
        """Width of a routed expert; 0 where there are none."""
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
    """int32, zero between products: few rows. Always memory of its own."""

    @classmethod
    def allocate(
        cls, bucket: int, hidden: int, weights: FFNWeights, plan: ExpertPlan, memory: Memory
    ) -> FFNWorkspace:
        slots = plan.groups * plan.block
        width = max(weights.width, weights.shared_width)
        parts = plan.groups * triton.cdiv(width, _CHUNK) if plan.few else plan.choices
        return cls(
            activation=memory.take(weights.dtype, slots, width),
            partials=memory.take(torch.float32, parts, bucket, hidden),
            arrivals=torch.zeros(hidden // 16, dtype=torch.int32, device=memory.device),
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

    ``x`` [bucket, hidden] of the model's dtype; ``plan`` as
    :func:`~crosspool.kernels.triton.expert_plan.plan_experts` made it from ``routed`` (experts,
    weights; None in a dense layer); ``out`` [bucket, hidden], float32 or the model's dtype. The
    order of the sum does not depend on the device's timing."""
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
        "WEIGHT": tl_dtype(weights.dtype),
        "BLOCK_M": plan.block,
    }
    tile = product_tile(plan.block, widest, hidden, weights.dtype, matrices=2)
    columns = min(tile.columns, _common_block(width, shared_width))
    gate_up_kernel[(triton.cdiv(widest, columns), plan.groups)](
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
        BLOCK_N=columns,
        BLOCK_K=tile.depth,
        FEW=plan.few,
        CHOICES=plan.choices,
        TOP_K=plan.top_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    tile = product_tile(plan.block, hidden, _common_block(width, shared_width), weights.dtype)
    block_n = min(tile.columns, depth_block(hidden))
    blocks = {"BLOCK_N": block_n, "BLOCK_K": tile.depth}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if plan.few:
        down_few_kernel[(hidden // block_n, plan.groups, triton.cdiv(widest, _CHUNK))](
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
    down_kernel[(hidden // block_n, plan.groups)](
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
    sum_kernel[(bucket,)](
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
    """Returns a depth that divides both widths, of which one may be 0."""
    return min(depth_block(w) for w in (width, shared_width) if w)
