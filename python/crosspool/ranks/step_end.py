"""The end of a step: which of its residual rows need logits, and what these become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from crosspool.models.spec import ModelSpec
from crosspool.ranks.kv_rank import Request
from crosspool.ranks.sampler import SamplingRow, sample, token_logprobs
from crosspool.transport.messages import Row, RowResult, StepResult, TokenLogprobs


@dataclass(frozen=True)
class Wanted:
    """A row of logits that a step needs, and its purpose."""

    row: int
    """Index of the step's row."""
    source: int
    """Index of the residual row that it comes from."""
    token: int
    """The prompt token whose log-probability it gives; -1: it yields a new token."""
    carried: Tensor | None = None
    """The residual [hidden] itself, if an earlier step has made it."""


class StepEnd:
    """What a step still has to make of its last residuals, and its result so far.

    ``requests`` has one entry for each of ``rows``. Residual rows are those of the step, row after
    row."""

    def __init__(
        self, step: int, rows: Sequence[Row], requests: Sequence[Request], spec: ModelSpec
    ) -> None:
        self._step = step
        self._rows = rows
        self._requests = requests
        self._spec = spec
        self._tokens = [-1] * len(rows)
        self._outputs: list[TokenLogprobs | None] = [None] * len(rows)
        self._prompts: list[list[TokenLogprobs]] = [[] for _ in rows]
        self.kept: list[tuple[Request, int]] = []
        """Residual rows that become ``last_residual`` of their requests."""
        self.wanted = self._plan()

    def _plan(self) -> list[Wanted]:
        """Lists prompt positions in order, then the rows that sample. The log-probability of the
        token at position p comes from the logits at p - 1, which for the first token of a chunk lie
        at the end of the chunk before."""
        prompts: list[Wanted] = []
        samples: list[Wanted] = []
        first = 0
        for i, (row, request) in enumerate(zip(self._rows, self._requests, strict=True)):
            last = first + len(row.tokens) - 1
            if request.logprobs.prompt_start >= 0:
                prompts += self._plan_prompt(i, first)
                request.last_residual = None
                if request.wants_prompt_logprob(row.start + len(row.tokens)):
                    self.kept.append((request, last))
            if row.sample:
                samples.append(Wanted(i, last, -1))
            first = last + 1
        return prompts + samples

    def _plan_prompt(self, index: int, first: int) -> list[Wanted]:
        row, request = self._rows[index], self._requests[index]
        wanted = []
        for offset, token in enumerate(row.tokens):
            position = row.start + offset
            if not request.wants_prompt_logprob(position):
                continue
            if position == 0:
                self._prompts[index].append(
                    TokenLogprobs(token=token, logprob=None, top=[], token_ids=[])
                )
            elif offset > 0:
                wanted.append(Wanted(index, first + offset - 1, token))
            elif request.last_residual is not None:
                wanted.append(Wanted(index, -1, token, request.last_residual))
            else:
                raise RuntimeError(
                    f"step {self._step}: request {row.request} wants the log-probability at "
                    f"position {position}, but position {position - 1} was not computed here"
                )
        return wanted

    def take(self, wanted: Sequence[Wanted], logits: Tensor) -> None:
        """Samples tokens and log-probabilities from ``logits``, float32 [len(wanted), vocab]."""
        samples = [(i, w.row) for i, w in enumerate(wanted) if w.token < 0]
        if samples:
            tokens = sample(
                logits[[i for i, _ in samples]],
                [self.sampling_row(row) for _, row in samples],
                self._spec.eos_token_ids,
            )
            for (_, row), token in zip(samples, tokens.tolist(), strict=True):
                self._tokens[row] = token
        reported = [
            (i, w)
            for i, w in enumerate(wanted)
            if w.token >= 0 or self._requests[w.row].logprobs.output
        ]
        if not reported:
            return
        asked = [self._requests[w.row].logprobs for _, w in reported]
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

    def choose(self, row: int, token: int) -> None:
        """Takes the token of a row that was sampled elsewhere."""
        self._tokens[row] = token

    def reports(self, row: int) -> bool:
        """Whether the row's new token comes with log-probabilities."""
        return self._requests[row].logprobs.output

    def sampling_row(self, row: int) -> SamplingRow:
        message, request = self._rows[row], self._requests[row]
        return SamplingRow(
            sampling=request.sampling,
            output=request.output,
            position=message.start + len(message.tokens),
            bitmask=message.bitmask,
        )

    def result(self) -> StepResult:
        """Returns the step's result, once every wanted row was taken or chosen."""
        return StepResult(
            step=self._step,
            rows=[
                RowResult(
                    request=row.request,
                    token=self._tokens[i],
                    output=self._outputs[i],
                    prompt=self._prompts[i],
                )
                for i, row in enumerate(self._rows)
            ],
        )
