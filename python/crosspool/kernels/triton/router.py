"""Which experts a row goes to, and the work that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from crosspool.kernels.triton.tables import TensorTable

FEW_ROWS = 16
"""Up to so many rows every chosen expert sees all of the bucket, those that did not choose it with
weight 0; above, rows are sorted by expert."""


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
    """The experts of every row, best first, and their weights: ``experts`` int32 and ``weights``
    float32 [bucket, top_k], from ``logits`` [bucket, experts] (what :func:`~.linear.linear` made
    of the router's weight; float32 or the model's dtype).

    The rules are those of :class:`crosspool.models.spec.RouterSpec`. ``bias``: float32 table of
    [experts], moves the choice only. Among equals the lower index wins; a NaN counts as larger
    than any number."""
    raise NotImplementedError


@dataclass(frozen=True)
class ExpertPlan:
    """A batch's rows by expert, as :func:`plan` makes them; int32 unless said. Group ``held`` (the
    last) is the MLP that every row takes."""

    group_expert: torch.Tensor
    """[groups]: the expert of each group of rows, counted from the first one held."""
    group_count: torch.Tensor
    """[1]: groups that are there."""
    group_weights: torch.Tensor
    """float32 [groups, bucket] (few rows): each row's weight; negative: it did not choose the
    expert. Many rows: empty."""
    slot_pair: torch.Tensor
    """[groups * block] (many rows): pair row * (top_k + 1) + choice of each slot; -1: none. Few
    rows: empty."""
    block: int
    """Rows of a group."""
    top_k: int
    held: int
    shared: bool

    @classmethod
    def allocate(
        cls, bucket: int, top_k: int, held: int, shared: bool, device: torch.device
    ) -> ExpertPlan:
        """``held``: routed experts on this rank (0 in a dense layer, with top_k 0); ``shared``:
        whether there is a MLP that every row takes (the shared expert, or the dense layer's)."""
        raise NotImplementedError


def plan(
    experts: torch.Tensor,
    weights: torch.Tensor,
    count: torch.Tensor,
    plan: ExpertPlan,
    *,
    first_expert: int = 0,
) -> None:
    """Sorts a batch by expert; ``experts`` and ``weights`` [bucket, top_k] as from :func:`route`
    ([bucket, 0] in a dense layer). Experts outside first_expert .. first_expert + held are another
    rank's."""
    raise NotImplementedError
