"""Steps that a loop carries out by itself, in native threads or on a GPU: what Python keeps of each
until its last result, and the attention rank that begins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from crosspool.kernels.engine_structs import DRAW, GREEDY, HOST
from crosspool.ranks.kv_rank import KVRank, ListsTensors, Request
from crosspool.ranks.sampler import adjusts, is_greedy, penalises
from crosspool.ranks.step_end import StepEnd
from crosspool.transport.messages import RowResult, Step, StepResult

_FIRST_PAGES = 16


@dataclass
class ResidentRequest(Request):
    """A request whose page table the loop reads."""

    pages: np.ndarray = field(default_factory=lambda: np.empty(_FIRST_PAGES, dtype=np.int32))
    """The page table, int32, with room behind ``page_count``. Native code reads it in place; it
    grows only between the request's steps."""
    page_count: int = 0

    def gain(self, pages: Sequence[int]) -> None:
        """Appends pages to the page table."""
        end = self.page_count + len(pages)
        if end > len(self.pages):
            larger = np.empty(max(end, 2 * len(self.pages)), dtype=np.int32)
            larger[: self.page_count] = self.pages[: self.page_count]
            self.pages = larger
        self.pages[self.page_count : end] = pages
        self.page_count = end


class Flight:
    """A step on its way through a loop, with all of its lease.

    A subclass writes the step's arguments; it sets ``_chosen``, int32 [lease, wanted rows], where
    the loop writes the tokens that it chooses, and ``leased``."""

    leased: bool
    """Whether further steps may follow that nobody has recalled."""
    _chosen: np.ndarray

    def __init__(self, step: Step, requests: Sequence[ResidentRequest], end: StepEnd) -> None:
        self.model = step.model
        self.rows = sum(len(row.tokens) for row in step.rows)
        self._message = step
        self._requests = requests
        self._end = end
        self._wanted = end.wanted
        self._choices = choices_of(end)

    def result(self, index: int, *, more: bool) -> StepResult:
        """Returns the result of the lease's step ``index``, which has ended.

        ``more``: the lease goes on."""
        chosen = self._chosen[index].tolist()
        if index > 0:
            rows = [
                RowResult(request=row.request, token=token)
                for row, token in zip(self._message.rows, chosen, strict=True)
            ]
            result = StepResult(step=self._message.step, rows=rows, more=more)
        else:
            for wanted, choice, token in zip(self._wanted, self._choices, chosen, strict=True):
                if choice != HOST:
                    self._end.choose(wanted.row, token)
            result = msgspec.structs.replace(self._end.result(), more=more)
        if more:
            for request, token in zip(self._requests, chosen, strict=True):
                request.output.append(token)
        return result

    def _may_be_leased(self) -> bool:
        """Whether the loop chooses a token for every row, in this step and in later ones."""
        return (
            len(self._wanted) == len(self._requests)
            and HOST not in self._choices
            and not self._end.kept
            and not any(penalises(request.sampling) for request in self._requests)
        )


def choices_of(end: StepEnd) -> list[int]:
    """Who chooses the token of each wanted row: HOST, or the loop by GREEDY or DRAW."""
    choices = []
    for wanted in end.wanted:
        if wanted.token >= 0 or end.reports(wanted.row):
            choices.append(HOST)
            continue
        row = end.sampling_row(wanted.row)
        if adjusts(row):
            choices.append(HOST)
        else:
            choices.append(GREEDY if is_greedy(row.sampling) else DRAW)
    return choices


class LoopPart(ListsTensors, Protocol):
    """A model's attention part as a loop reads it."""

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that may come."""


L = TypeVar("L", bound=LoopPart)


class LoopRank(KVRank[L, ResidentRequest]):
    """An attention rank that a loop drives. Its chunks are mapped, and its page tables grow, in the
    order in which steps are begun."""

    def _begin(self, step: Step, max_rows: int) -> tuple[list[ResidentRequest], StepEnd]:
        """Maps the step's chunks, opens its requests and extends their page tables; returns the
        rows' requests, and the end of the step.

        Raises RuntimeError where the step contradicts earlier ones, or has more than ``max_rows``
        token rows."""
        self._open(step, ResidentRequest)
        requests = []
        for row in step.rows:
            request = self._request(step, row)
            request.gain(row.pages)
            self._check_pages(step, row, request.page_count)
            self._check_row(step, row, self.parts[step.model].positions)
            requests.append(request)
        rows = sum(len(row.tokens) for row in step.rows)
        if not 1 <= rows <= max_rows:
            raise RuntimeError(f"step {step.step}: {rows} token rows; 1 to {max_rows} fit")
        return requests, StepEnd(step.step, step.rows, requests, self.specs[step.model])
