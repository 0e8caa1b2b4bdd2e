"""The LM head of a batch under the host loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from crosspool.models.spec import ModelSpec
from crosspool.ranks.host.attention_rank import Batch
from crosspool.ranks.step_end import StepEnd, Wanted
from crosspool.transport.messages import StepResult

if TYPE_CHECKING:
    from crosspool.ranks.host.attention import AttentionPart

LOGITS_BYTES = 64 << 20
"""Logits that are held at once, in bytes."""


class LMHead:
    """Turns a batch's last residual into its result, a bounded number of rows at a time, so that
    neither memory nor the other lanes suffer from a long prompt's log-probabilities. It is created
    after the last combine."""

    def __init__(self, batch: Batch, part: AttentionPart, spec: ModelSpec) -> None:
        self._part = part
        self._residual = batch.residual
        self._chunk = max(1, LOGITS_BYTES // (4 * spec.vocab))
        self._end = StepEnd(batch.step, batch.rows, batch.requests, spec)
        for request, row in self._end.kept:
            request.last_residual = batch.residual[row].clone()
        self._next = 0

    def advance(self) -> tuple[int, StepResult | None]:
        """Works on the next rows; returns their number, and after the last ones the result."""
        wanted = self._end.wanted[self._next : self._next + self._chunk]
        self._next += len(wanted)
        if wanted:
            self._end.take(wanted, self._part.logits(self._gather(wanted)))
        if self._next < len(self._end.wanted):
            return len(wanted), None
        return len(wanted), self._end.result()

    def _gather(self, wanted: Sequence[Wanted]) -> Tensor:
        rows = self._residual[[max(w.source, 0) for w in wanted]]
        for i, w in enumerate(wanted):
            if w.carried is not None:
                rows[i] = w.carried
        return rows
