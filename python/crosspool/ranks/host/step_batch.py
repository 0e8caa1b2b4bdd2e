"""The batch of one step as the attention part sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from crosspool.kernels.attention import RowSpan

__all__ = ["RowSpan", "StepBatch"]


@dataclass
class StepBatch:
    """Rows of one model that go through the layers together, request by request.

    Example: a decode row at position 40 beside a prompt chunk of positions 0 to 15::

        StepBatch(
            positions=torch.tensor([40, *range(16)]),
            segments=[
                RowSpan(first_row=0, rows=1, start=40, pages=torch.tensor([7, 2, 9])),
                RowSpan(first_row=1, rows=16, start=0, pages=torch.tensor([4])),
            ],
        )
    """

    positions: torch.Tensor
    """Position of each row in its sequence: int64 [T]."""
    segments: Sequence[RowSpan]
    """Every row belongs to exactly one; a request has at most one."""
    rope: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)
    """cos and sin of the positions; the attention part computes them once per step."""
    _slots: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)

    def slots(self, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the place of each row's KV: page and offset in the page, int64 [T] each."""
        if self._slots is None:
            pages = torch.empty_like(self.positions)
            for segment in self.segments:
                rows = slice(segment.first_row, segment.first_row + segment.rows)
                pages[rows] = segment.pages[self.positions[rows] // page_size]
            self._slots = pages, self.positions % page_size
        return self._slots
