"""Steps as the arguments of native code, and the attention rank that makes them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from crosspool.kernels import engine_structs as es
from crosspool.ranks.flight import Flight, LoopRank, ResidentRequest
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.step_end import StepEnd, Wanted
from crosspool.transport.messages import Row, Step


class ResidentFlight(Flight):
    """A step on its way through the resident loop, and everything that native code reads of it."""

    def __init__(
        self,
        step: Step,
        requests: Sequence[ResidentRequest],
        end: StepEnd,
        state_pages: int,
    ) -> None:
        """``state_pages``: the first pages of each request, which have its recurrent state."""
        super().__init__(step, requests, end)
        self._tokens = np.array([t for row in step.rows for t in row.tokens], dtype=np.int32)
        self._pages = [request.pages for request in requests]
        self._segments = _segments(step.rows, self._pages, state_pages)
        self._stops = [np.array(r.sampling.stop_token_ids, dtype=np.int32) for r in requests]
        self._native_wanted = _wanted(end, self._choices, self._stops)
        self._keep = _keep(end)
        lease = step.lease if self._may_be_leased() else 1
        self.leased = lease > 1
        self._chosen = np.full((lease, len(self._wanted)), -1, dtype=np.int32)
        self.arguments = es.StepArguments(
            step=step.step,
            model=step.model,
            rows=self.rows,
            segment_count=len(step.rows),
            wanted_count=len(self._wanted),
            keep_count=len(self._keep),
            lease=lease,
            tokens=self._tokens.ctypes.data,
            segments=self._segments.ctypes.data,
            wanted=self._native_wanted.ctypes.data,
            keep=self._keep.ctypes.data,
            chosen=self._chosen.ctypes.data,
        )

    def take_logits(self, first: int, count: int, address: int, vocab: int) -> None:
        """Samples tokens and log-probabilities of wanted rows that native code leaves to Python.

        Their logits are float32 [count, vocab] at ``address``."""
        memory = (ctypes.c_float * (count * vocab)).from_address(address)
        logits = torch.frombuffer(memory, dtype=torch.float32).view(count, vocab)
        ours = [i for i in range(count) if self._choices[first + i] == es.HOST]
        rows = logits if len(ours) == count else logits[ours]
        self._end.take([self._wanted[first + i] for i in ours], rows)


class ResidentRank(LoopRank[PackedAttention]):
    """The attention rank as the resident loop drives it."""

    def begin(self, step: Step, max_rows: int) -> ResidentFlight:
        """Maps the step's chunks, opens its requests, extends their page tables and encodes it.

        Raises RuntimeError where the step contradicts earlier ones, or is too large."""
        requests, end = self._begin(step, max_rows)
        for kept, _ in end.kept:
            kept.last_residual = torch.empty(self.specs[step.model].hidden)
        return ResidentFlight(step, requests, end, self._state_pages(step.model))


def _segments(rows: Sequence[Row], pages: Sequence[np.ndarray], state_pages: int) -> np.ndarray:
    out = np.zeros(len(rows), dtype=es.SEGMENT)
    first = 0
    for i, (row, table) in enumerate(zip(rows, pages, strict=True)):
        state = table.ctypes.data
        kv = state + state_pages * table.itemsize
        out[i] = (kv, first, len(row.tokens), row.start, state)
        first += len(row.tokens)
    return out


def _wanted(end: StepEnd, choices: Sequence[int], stops: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros(len(choices), dtype=es.WANTED)
    for i, (wanted, choice) in enumerate(zip(end.wanted, choices, strict=True)):
        stop = stops[wanted.row]
        at = (_residual(wanted), max(wanted.source, 0))
        out[i] = (*at, choice, _no_rule, 0, 0, stop.ctypes.data, len(stop))
        if choice == es.DRAW:
            row = end.sampling_row(wanted.row)
            s = row.sampling
            out[i]["rule"] = (s.top_p, s.temperature, s.min_p, s.top_k)
            out[i]["seed"], out[i]["position"] = s.seed & (2**64 - 1), row.position
    return out


_no_rule = (1.0, 1.0, 0.0, -1)


def _residual(wanted: Wanted) -> int:
    return 0 if wanted.carried is None else wanted.carried.data_ptr()


def _keep(end: StepEnd) -> np.ndarray:
    out = np.zeros(len(end.kept), dtype=es.KEEP)
    for i, (request, row) in enumerate(end.kept):
        assert request.last_residual is not None
        out[i] = (request.last_residual.data_ptr(), row)
    return out
