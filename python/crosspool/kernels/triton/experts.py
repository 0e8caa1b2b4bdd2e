"""Gated MLPs: the routed experts, the shared expert, a dense layer's only one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosspool.kernels.triton.router import ExpertPlan
from crosspool.kernels.triton.tables import TensorTable


@dataclass(frozen=True)
class FFNWeights:
    """A model's MLPs on one rank. Routed experts and the shared one may differ in width; the
    widths are multiples of 16."""

    gate_up: TensorTable | None
    """[layers, held] tables of [2 * I, hidden], gate first; None: no routed experts."""
    down: TensorTable | None
    """[layers, held] tables of [hidden, I]."""
    shared_gate_up: TensorTable | None
    """[layers] table of [2 * S, hidden]: the shared expert's, or a dense layer's."""
    shared_down: TensorTable | None


@dataclass(frozen=True)
class FFNWorkspace:
    """Activations between the two products; one serves all layers of a lane."""

    activation: torch.Tensor
    """Model dtype [groups * block, width]: few rows; [pairs, width]: many."""
    pair_out: torch.Tensor
    """float32 [bucket * (top_k + 1), hidden] (many rows); few rows: empty."""

    @classmethod
    def allocate(
        cls, bucket: int, hidden: int, weights: FFNWeights, plan: ExpertPlan
    ) -> FFNWorkspace:
        raise NotImplementedError


def gated_mlps(
    x: torch.Tensor,
    weights: FFNWeights,
    layer: torch.Tensor,
    count: torch.Tensor,
    plan: ExpertPlan,
    routed: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    workspace: FFNWorkspace,
) -> None:
    """out[row] = sum over its experts here of weight * down(silu(gate(x[row])) * up(x[row])), plus
    the shared expert's with weight 1; rows none of whose experts lie here become zero.

    ``x`` [bucket, hidden] of the model's dtype; ``routed`` what :func:`~.router.route` wrote
    (experts, weights), None in a dense layer; ``out`` [bucket, hidden], float32 or the model's
    dtype. The order of the sum does not depend on the device's timing."""
    raise NotImplementedError
