"""The end of a step: LM head, log-probabilities and sampling, a bounded number of rows at a time,
so that neither memory nor the other lanes suffer from a long prompt's log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosspool.models.spec import ModelSpec
from crosspool.ranks.attention_rank import Batch
from crosspool.ranks.sampler import SamplingRow, sample, token_logprobs
from crosspool.transport.messages import RowResult, StepResult, TokenLogprobs

if TYPE_CHECKING:
    from crosspool.ranks.attention_part import AttentionPart

LOGITS_BYTES = 64 << 20
"""Logits that are held at once."""


@dataclass(frozen=True)
class _Wanted:
    """One row of logits and what it is for."""

    row: int
    """Index of the step's row."""
    source: int
    """Index into the residual rows."""
    token: int
    """The prompt token whose log-probability it gives; -1: it yields a new token."""


class LMHead:
    """One batch's way from its last residual to its result. Create it after the last combine."""

    def __init__(self, batch: Batch, part: AttentionPart, spec: ModelSpec) -> None:
        self._batch = batch
        self._part = part
        self._spec = spec
        self._chunk = max(1, LOGITS_BYTES // (4 * spec.vocab))
        self._tokens = [-1] * len(batch.rows)
        self._outputs: list[TokenLogprobs | None] = [None] * len(batch.rows)
        self._prompts: list[list[TokenLogprobs]] = [[] for _ in batch.rows]
        self._residual = batch.residual
        self._wanted = self._plan()
        self._next = 0

    def advance(self) -> tuple[int, StepResult | None]:
        """Works on the next rows: returns their number, and the result when they were the last."""
        wanted = self._wanted[self._next : self._next + self._chunk]
        self._next += len(wanted)
        if wanted:
            self._compute(wanted)
        if self._next < len(self._wanted):
            return len(wanted), None
        rows = [
            RowResult(
                request=row.request,
                token=self._tokens[i],
                output=self._outputs[i],
                prompt=self._prompts[i],
            )
            for i, row in enumerate(self._batch.rows)
        ]
        return len(wanted), StepResult(step=self._batch.step, rows=rows)

    def _plan(self) -> list[_Wanted]:
        """Prompt positions in order, then the rows that sample. Position p's own token is judged by
        the logits at p - 1, which for a chunk's first token lie at the end of the last chunk."""
        batch = self._batch
        prompts, samples = [], []
        carried: list[Tensor] = []
        for i, (row, request, segment) in enumerate(
            zip(batch.rows, batch.requests, batch.shape.segments, strict=True)
        ):
            last = segment.first_row + segment.rows - 1
            end = row.start + len(row.tokens)
            for offset, token in enumerate(row.tokens):
                position = row.start + offset
                if not request.wants_prompt_logprob(position):
                    continue
                if position == 0:
                    self._prompts[i].append(
                        TokenLogprobs(token=token, logprob=None, top=[], token_ids=[])
                    )
                elif offset > 0:
                    prompts.append(_Wanted(i, segment.first_row + offset - 1, token))
                elif request.last_residual is not None:
                    prompts.append(_Wanted(i, len(batch.residual) + len(carried), token))
                    carried.append(request.last_residual)
                else:
                    raise RuntimeError(
                        f"step {batch.step}: request {row.request} wants the log-probability at "
                        f"position {position}, but position {position - 1} was not computed here"
                    )
            request.last_residual = (
                batch.residual[last].clone() if request.wants_prompt_logprob(end) else None
            )
            if row.sample:
                samples.append(_Wanted(i, last, -1))
        if carried:
            self._residual = torch.cat([batch.residual, torch.stack(carried)])
        return prompts + samples

    def _compute(self, wanted: list[_Wanted]) -> None:
        logits = self._part.logits(self._residual[[w.source for w in wanted]])
        samples = [(i, w.row) for i, w in enumerate(wanted) if w.token < 0]
        if samples:
            tokens = sample(
                logits[[i for i, _ in samples]],
                [self._sampling_row(row) for _, row in samples],
                self._spec.eos_token_ids,
            )
            for (_, row), token in zip(samples, tokens.tolist(), strict=True):
                self._tokens[row] = token
        reported = [
            (i, w)
            for i, w in enumerate(wanted)
            if w.token >= 0 or self._batch.requests[w.row].logprobs.output
        ]
        if not reported:
            return
        asked = [self._batch.requests[w.row].logprobs for _, w in reported]
        values = token_logprobs(
            logits[[i for i, _ in reported]],
            [w.token if w.token >= 0 else self._tokens[w.row] for _, w in reported],
            [logprobs.top for logprobs in asked],
            [logprobs.token_ids for logprobs in asked],
        )
        for (_, w), value in zip(reported, values, strict=True):
            if w.token >= 0:
                self._prompts[w.row].append(value)
            else:
                self._outputs[w.row] = value

    def _sampling_row(self, row: int) -> SamplingRow:
        message, request = self._batch.rows[row], self._batch.requests[row]
        return SamplingRow(
            sampling=request.sampling,
            output=request.output,
            position=message.start + len(message.tokens),
            bitmask=message.bitmask,
        )
