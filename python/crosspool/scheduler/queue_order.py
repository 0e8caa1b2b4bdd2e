"""Which model's queue is admitted from next: the order of the queues.

To add an order, write its class here and let :func:`queue_order` choose it by an option.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Protocol

from crosspool.config.deployment import Deployment
from crosspool.scheduler.sequence import Sequence


class QueueOrder(Protocol):
    """The order of the queues of all models; within a queue, who came first goes first."""

    def next(self, heads: Iterable[Sequence]) -> Sequence | None:
        """Which of ``heads``, the first request of each queue, to try next; None without any."""
        ...

    def admitted(self, seq: Sequence) -> None:
        """``seq`` has been admitted."""
        ...

    def forget(self, model: int) -> None:
        """The model is gone."""
        ...


class ModelsInTurn:
    """The model whose last admission lies furthest back goes first, and among models that have had
    none, the one whose request came first. A flood of requests for one model so delays another
    model's request by one admission, not by the flood."""

    def __init__(self) -> None:
        self._turns = count(1)
        self._last_turn: dict[int, int] = {}

    def next(self, heads: Iterable[Sequence]) -> Sequence | None:
        def place(seq: Sequence) -> tuple[int, int]:
            return self._last_turn.get(seq.model, 0), seq.number

        return min(heads, key=place, default=None)

    def admitted(self, seq: Sequence) -> None:
        self._last_turn[seq.model] = next(self._turns)

    def forget(self, model: int) -> None:
        self._last_turn.pop(model, None)


def queue_order(deployment: Deployment) -> QueueOrder:
    """The order that ``deployment`` asks for. There is one so far."""
    return ModelsInTurn()
