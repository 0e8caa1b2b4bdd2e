"""The attention rank as the host loop drives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosspool.ranks.host.step_batch import RowSpan, StepBatch
from crosspool.ranks.kv_rank import KVRank, Request
from crosspool.transport.messages import Row, Step

if TYPE_CHECKING:
    from crosspool.ranks.host.attention import AttentionPart  # noqa: F401


@dataclass
class PagedRequest(Request):
    pages: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The page table: int64 [pages]."""


@dataclass
class Batch:
    """A step on its way through the layers."""

    step: int
    model: int
    rows: list[Row]
    requests: list[PagedRequest]
    """The requests of ``rows``, one each."""
    token_ids: Tensor
    """The rows' tokens one after another: int64 [T]."""
    shape: StepBatch
    residual: Tensor
    """The sum that the layers add to, [T, hidden]; empty until the embedding."""
    leased: bool = False
    """The host loop ends every lease after its first step."""


class AttentionRank(KVRank["AttentionPart", PagedRequest]):
    """The attention rank as the host loop drives it."""

    def begin(self, step: Step) -> Batch:
        """Maps the step's chunks, opens its requests and extends their page tables.

        Raises RuntimeError where the step contradicts earlier ones."""
        self._open(step, PagedRequest)
        requests, segments, positions = [], [], []
        state = self._state_pages(step.model)
        tokens: list[int] = []
        for row in step.rows:
            request = self._request(step, row)
            if row.pages:
                request.pages = torch.cat([request.pages, torch.tensor(row.pages)])
            self._check_pages(step, row, len(request.pages))
            segments.append(
                RowSpan(
                    first_row=len(tokens),
                    rows=len(row.tokens),
                    start=row.start,
                    pages=request.pages[state:],
                    state=request.pages[:state],
                )
            )
            positions.append(torch.arange(row.start, row.start + len(row.tokens)))
            tokens += row.tokens
            requests.append(request)
        return Batch(
            step=step.step,
            model=step.model,
            rows=step.rows,
            requests=requests,
            token_ids=torch.tensor(tokens, dtype=torch.int64),
            shape=StepBatch(torch.cat(positions), segments),
            residual=torch.empty(0),
        )

    def attend(self, batch: Batch, layer: int) -> Tensor:
        """Computes the attention part of one layer; returns the hidden states [T, hidden] to
        dispatch."""
        part = self.parts[batch.model]
        if layer == 0:
            batch.residual = part.embed(batch.token_ids)
        batch.residual, normed = part.attend(
            layer, batch.residual, batch.shape, self.kv[batch.model]
        )
        return normed

    def combine(self, batch: Batch, partials: Sequence[Tensor]) -> None:
        """Adds the FFN ranks' partial sums, each [T, hidden], to the residual."""
        if len(partials) == 1:
            batch.residual = batch.residual + partials[0]
            return
        total = partials[0].to(torch.float32, copy=True)
        for partial in partials[1:]:
            total += partial
        batch.residual = batch.residual + total.to(batch.residual.dtype)
