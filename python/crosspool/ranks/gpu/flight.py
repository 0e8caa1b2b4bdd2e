"""Steps as a GPU takes them, inputs in host memory that the device reads and arguments for the
loop, and the attention rank that makes them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from crosspool.kernels.cuda_loop_structs import GPUStepArguments
from crosspool.kernels.engine_structs import DRAW, HOST
from crosspool.models.spec import DTYPE_BYTES, ModelSpec
from crosspool.ranks.flight import Flight, LoopRank, ResidentRequest
from crosspool.ranks.gpu.inputs import HostInputs, HostMemory, InputLayout
from crosspool.ranks.step_end import StepEnd, Wanted
from crosspool.transport.messages import Step, StepResult

if TYPE_CHECKING:
    from crosspool.ranks.gpu.host_side import HostSide
    from crosspool.ranks.gpu.stages import Stages
    from crosspool.ranks.gpu.weights import GPUAttention  # noqa: F401


class LookMemory:
    """Page-locked memory through which the host looks at logits and residuals. It is there before
    the loop starts: what looks at them makes no memory that the device uses."""

    def __init__(self, specs: Sequence[ModelSpec], wanted: int, host: HostSide) -> None:
        """``wanted``: most rows that want a token in one step."""
        vocab = max((spec.vocab for spec in specs), default=0)
        row_bytes = max((spec.hidden * DTYPE_BYTES[spec.dtype] for spec in specs), default=0)
        self.rows = host.full((wanted,), 0, torch.int32)
        """Indices of rows, int32 [wanted]."""
        self._logits = host.full((wanted * vocab,), 0, torch.float32)
        self._residual = host.full((row_bytes,), 0, torch.uint8)

    def logits(self, like: Tensor) -> Tensor:
        """Room for float32 [rows, vocab]."""
        return self._logits[: like.numel()].view(like.shape)

    def residual(self, like: Tensor) -> Tensor:
        """Room for one row, [hidden] in the model's dtype."""
        return self._residual[: like.nbytes].view(like.dtype)


class GPUFlight(Flight):
    """A step on its way through the stages of a lane."""

    def __init__(
        self,
        step: Step,
        requests: Sequence[ResidentRequest],
        end: StepEnd,
        *,
        layout: InputLayout,
        lane: int,
        memory: HostMemory,
    ) -> None:
        """``memory``: what ``lane`` shares with the host."""
        super().__init__(step, requests, end)
        self.lane = lane
        self._layout = layout
        self._memory = memory
        self.for_host = HOST in self._choices or bool(end.kept)
        """Whether the host samples from the logits."""
        lease = min(step.lease, memory.lease) if self._may_be_leased() else 1
        if lease > 1 and not self._write_stops():
            lease = 1
        self.leased = lease > 1
        wanted = min(len(end.wanted), layout.wanted, self.rows)
        if self.for_host:
            wanted = max(1, wanted)  # the loop asks for a row where the host looks
        self._chosen = memory.tokens.numpy()[: lease * wanted].reshape(lease, wanted)
        self._chosen.fill(-1)
        self._write_inputs()
        self.arguments = GPUStepArguments(
            step=step.step,
            model=step.model,
            rows=self.rows,
            wanted=wanted,
            lease=lease,
            for_host=int(self.for_host),
            inputs=memory.inputs.data_ptr(),
            tokens=memory.tokens.data_ptr(),
            stops=memory.stops.data_ptr() if self.leased else 0,
            stop_ends=memory.stop_ends.data_ptr() if self.leased else 0,
        )

    def look(self, stages: Stages, memory: LookMemory) -> None:
        """Samples from the logits of all wanted rows, reports their log-probabilities, and keeps
        the residuals that later steps need."""
        scratch, most = stages.scratch, self._layout.wanted
        wanted = self._end.wanted
        for first in range(0, len(wanted), most):
            group = wanted[first : first + most]
            if first > 0 or any(w.carried is not None for w in group):
                _compute_logits(stages, group, memory)
            on_device = scratch.logits[: len(group)]
            logits = memory.logits(on_device)
            logits.copy_(on_device)
            self._end.take(group, logits)
        for request, row in self._end.kept:
            torch.add(scratch.residual[row], scratch.partial[row], out=scratch.last[0])
            residual = memory.residual(scratch.last[0])
            residual.copy_(scratch.last[0])
            request.last_residual = residual.clone()

    def result(self, index: int, *, more: bool) -> StepResult:
        return self._end.result() if self.for_host else super().result(index, more=more)

    def _may_be_leased(self) -> bool:
        return super()._may_be_leased() and len(self._requests) == self.rows

    def _write_stops(self) -> bool:
        """Writes the stop tokens, row by row; False: there is no room for so many."""
        stops = [request.sampling.stop_token_ids for request in self._requests]
        ends = np.cumsum([len(of_row) for of_row in stops])
        if ends[-1] > len(self._memory.stops):
            return False
        flat = [token for of_row in stops for token in of_row]
        self._memory.stops.numpy()[: len(flat)] = flat
        self._memory.stop_ends.numpy()[: len(ends)] = ends
        return True

    def _write_inputs(self) -> None:
        host = HostInputs(self._layout, self._memory.inputs)
        first, pages = 0, 0
        for i, (row, request) in enumerate(zip(self._message.rows, self._requests, strict=True)):
            end = first + len(row.tokens)
            host["tokens"][first:end] = row.tokens
            host["positions"][first:end] = np.arange(row.start, row.start + len(row.tokens))
            host["row_sequences"][first:end] = i
            host.page_table[i, : request.page_count] = request.pages[: request.page_count]
            first, pages = end, max(pages, request.page_count)
        wanted = self._end.wanted[: self._layout.wanted]
        host["wanted_rows"].fill(0)
        host["temperature"].fill(0.0)
        for i, (one, choice) in enumerate(zip(wanted, self._choices, strict=False)):
            host["wanted_rows"][i] = max(one.source, 0)
            if choice == DRAW:
                sampled = self._end.sampling_row(one.row)
                rule = sampled.sampling
                host["temperature"][i], host["top_p"][i] = rule.temperature, rule.top_p
                host["top_k"][i], host["min_p"][i] = rule.top_k, rule.min_p
                host["seed"][i] = np.uint64(rule.seed & (2**64 - 1)).astype(np.int64)
                host["position"][i] = sampled.position
        host.close(
            len(self._message.rows), pages, max(1, len(wanted)) if self.for_host else len(wanted)
        )


class GPURank(LoopRank["GPUAttention"]):
    """The attention rank as a GPU's loop drives it."""

    def begin(
        self,
        step: Step,
        buckets: Sequence[int],
        layouts: Sequence[Sequence[InputLayout]],
        lane: int,
        memory: HostMemory,
    ) -> GPUFlight:
        """``buckets``: rows, ascending; ``layouts``: by model and bucket; ``memory``: what the free
        ``lane`` shares with the host.

        Raises RuntimeError where the step contradicts earlier ones, or is too large."""
        requests, end = self._begin(step, buckets[-1])
        bucket = bisect.bisect_left(buckets, sum(len(row.tokens) for row in step.rows))
        layout = layouts[step.model][bucket]
        longest = max(request.page_count for request in requests)
        for count, fit, what in (
            (len(requests), layout.sequences, "requests"),
            (longest, layout.pages, "pages of a request"),
        ):
            if count > fit:
                raise RuntimeError(f"step {step.step}: {count} {what}; {fit} fit")
        flight = GPUFlight(step, requests, end, layout=layout, lane=lane, memory=memory)
        flight.arguments.bucket = bucket
        return flight


def _compute_logits(stages: Stages, wanted: Sequence[Wanted], memory: LookMemory) -> None:
    """Computes logits of rows that the head stage did not take, or of residuals from earlier
    steps."""
    rows = memory.rows[: stages.layout.wanted]
    rows.zero_()
    rows.numpy()[: len(wanted)] = [max(w.source, 0) for w in wanted]
    stages.inputs.wanted_rows.copy_(rows)
    stages.inputs.wanted_count.fill_(len(wanted))
    stages.gather()
    for i, one in enumerate(wanted):
        if one.carried is not None:
            residual = memory.residual(one.carried)
            residual.copy_(one.carried)
            stages.scratch.last[i].copy_(residual)
    stages.logits()
