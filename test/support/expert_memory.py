"""The rule of an expert pool's memory, by trying every run of neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

_LARGEST_WEIGHT = 2.0**400


@dataclass
class _Expert:
    bytes: int
    offset: int | None = None
    uses: float = 0.0
    holds: int = 0

    @property
    def worth(self) -> float:
        return self.uses * float(self.bytes)


class ExpertMemory:
    """``crosspool::ExpertMemory`` (sgl-kernel-ext/cpu/engine/expert_memory.h), which says what its
    methods do."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = nbytes
        self._growth = self._weight = 1.0
        self._experts: list[_Expert | None] = []
        self._free: list[int] = []

    def add(self, nbytes: int) -> int:
        if self._free:
            number = self._free.pop()
            self._experts[number] = _Expert(nbytes)
            return number
        self._experts.append(_Expert(nbytes))
        return len(self._experts) - 1

    def remove(self, expert: int) -> None:
        self._experts[expert] = None
        self._free.append(expert)

    def half_life(self, ticks: int) -> None:
        self._growth = math.exp2(1.0 / ticks)

    def tick(self) -> None:
        self._weight *= self._growth
        if self._weight >= _LARGEST_WEIGHT:
            self._weight /= _LARGEST_WEIGHT
            for expert in filter(None, self._experts):
                expert.uses /= _LARGEST_WEIGHT

    def use(self, expert: int) -> None:
        self.of(expert).uses += self._weight

    def hold(self, expert: int) -> None:
        self.of(expert).holds += 1

    def release(self, expert: int) -> None:
        self.of(expert).holds -= 1

    def drop(self, expert: int) -> None:
        self.of(expert).offset = None

    def of(self, expert: int) -> _Expert:
        found = self._experts[expert]
        assert found is not None
        return found

    def present(self) -> list[int]:
        """The experts that are present, in the order of their memory."""
        offsets = {
            number: expert.offset
            for number, expert in enumerate(self._experts)
            if expert is not None and expert.offset is not None
        }
        return sorted(offsets, key=lambda number: offsets[number])

    def place(self, expert: int) -> list[int] | None:
        """Returns those that went, or None where there is not enough that is not held."""
        it, present = self.of(expert), self.present()
        begins = [self.of(other).offset or 0 for other in present] + [self.bytes]
        ends = [0] + [
            begin + self.of(other).bytes for begin, other in zip(begins, present, strict=False)
        ]
        # A run takes present[first:last]: its room goes from ends[first] to begins[last].
        runs = [
            (first, last)
            for first in range(len(begins))
            for last in range(first, len(begins))
            if begins[last] - ends[first] >= it.bytes
            and not any(self.of(other).holds for other in present[first:last])
        ]
        holes = [run for run in runs if run[0] == run[1]]
        if not runs:
            return None
        first, last = holes[0] if holes else min(runs, key=lambda run: self._cost(present, *run))
        it.offset = ends[first]
        for other in present[first:last]:
            self.of(other).offset = None
        return present[first:last]

    def _cost(self, present: list[int], first: int, last: int) -> tuple[float, int, int]:
        worth = 0.0
        for other in present[first:last]:
            worth += self.of(other).worth
        return worth, last, last - first
