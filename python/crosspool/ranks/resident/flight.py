"""The attention rank as the resident loop drives it: steps become arguments for native code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from crosspool.kernels import engine_structs as es
from crosspool.ranks.host.attention_rank import KVRank, Request
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.sampler import adjusts, is_greedy, penalises
from crosspool.ranks.step_end import StepEnd, Wanted
from crosspool.transport.messages import Row, RowResult, Step, StepResult

_FIRST_PAGES = 16


@dataclass
class ResidentRequest(Request):
    pages: np.ndarray = field(default_factory=lambda: np.empty(_FIRST_PAGES, dtype=np.int32))
    """Its page table, with room behind ``page_count``. Native code reads it where it is; it grows
    between the request's steps only."""
    page_count: int = 0

    def gain(self, pages: Sequence[int]) -> None:
        end = self.page_count + len(pages)
        if end > len(self.pages):
            larger = np.empty(max(end, 2 * len(self.pages)), dtype=np.int32)
            larger[: self.page_count] = self.pages[: self.page_count]
            self.pages = larger
        self.pages[self.page_count : end] = pages
        self.page_count = end


class Flight:
    """A step on its way through the resident loop, and everything that native code reads of it."""

    def __init__(self, step: Step, requests: Sequence[ResidentRequest], end: StepEnd) -> None:
        self.model = step.model
        self._step = step.step
        self._requests = requests
        self._end = end
        self._wanted = end.wanted
        self._tokens = np.array([t for row in step.rows for t in row.tokens], dtype=np.int32)
        self._rows = step.rows
        self._pages = [request.pages for request in requests]
        self._segments = _segments(step.rows, self._pages)
        self._choices = choices_of(end)
        self._stops = [np.array(r.sampling.stop_token_ids, dtype=np.int32) for r in requests]
        self._native_wanted = _wanted(end, self._choices, self._stops)
        self._keep = _keep(end)
        lease = step.lease if self._may_be_leased() else 1
        self.leased = lease > 1
        """Whether further steps may follow that nobody has recalled."""
        self._chosen = np.full((lease, len(self._wanted)), -1, dtype=np.int32)
        self.arguments = es.StepArguments(
            step=step.step,
            model=step.model,
            rows=len(self._tokens),
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
        """Samples from, and reports of, the logits of wanted rows that native code leaves to us:
        float32 [count, vocab] at ``address``."""
        memory = (ctypes.c_float * (count * vocab)).from_address(address)
        logits = torch.frombuffer(memory, dtype=torch.float32).view(count, vocab)
        ours = [i for i in range(count) if self._choices[first + i] == es.HOST]
        rows = logits if len(ours) == count else logits[ours]
        self._end.take([self._wanted[first + i] for i in ours], rows)

    def result(self, index: int, *, more: bool) -> StepResult:
        """Of the lease's step ``index``, after its end; ``more``: it was not the last."""
        chosen = self._chosen[index].tolist()
        if index > 0:
            rows = [
                RowResult(request=row.request, token=token)
                for row, token in zip(self._rows, chosen, strict=True)
            ]
            result = StepResult(step=self._step, rows=rows, more=more)
        else:
            for wanted, choice, token in zip(self._wanted, self._choices, chosen, strict=True):
                if choice != es.HOST:
                    self._end.choose(wanted.row, token)
            result = msgspec.structs.replace(self._end.result(), more=more)
        if more:
            for request, token in zip(self._requests, chosen, strict=True):
                request.output.append(token)
        return result

    def _may_be_leased(self) -> bool:
        """Whether native code chooses now and later, for every row."""
        return (
            len(self._wanted) == len(self._requests)
            and es.HOST not in self._choices
            and not self._end.kept
            and not any(penalises(request.sampling) for request in self._requests)
        )


class ResidentRank(KVRank[PackedAttention, ResidentRequest]):
    """One attention rank. Its chunks are mapped, and its page tables grow, in the order in which
    steps are begun."""

    def begin(self, step: Step, max_rows: int) -> Flight:
        """Raises RuntimeError where the step contradicts what came before, or is too large."""
        self._open(step, ResidentRequest)
        requests = []
        for row in step.rows:
            request = self._request(step, row)
            request.gain(row.pages)
            self._check_pages(step, row, request.page_count)
            requests.append(request)
            self._check_row(step, row, self.parts[step.model].positions)
        rows = sum(len(row.tokens) for row in step.rows)
        if not 1 <= rows <= max_rows:
            raise RuntimeError(f"step {step.step}: {rows} token rows; 1 to {max_rows} fit")
        spec = self.specs[step.model]
        end = StepEnd(step.step, step.rows, requests, spec)
        for kept, _ in end.kept:
            kept.last_residual = torch.empty(spec.hidden)
        return Flight(step, requests, end)


def _segments(rows: Sequence[Row], pages: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros(len(rows), dtype=es.SEGMENT)
    first = 0
    for i, (row, table) in enumerate(zip(rows, pages, strict=True)):
        out[i] = (table.ctypes.data, first, len(row.tokens), row.start)
        first += len(row.tokens)
    return out


def choices_of(end: StepEnd) -> list[int]:
    """Who chooses, by wanted row."""
    choices = []
    for wanted in end.wanted:
        if wanted.token >= 0 or end.reports(wanted.row):
            choices.append(es.HOST)
            continue
        row = end.sampling_row(wanted.row)
        if adjusts(row):
            choices.append(es.HOST)
        else:
            choices.append(es.GREEDY if is_greedy(row.sampling) else es.DRAW)
    return choices


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
