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


class ModelsInTurn:
    """The model whose last admission lies furthest back goes first, and among models that have had
    none, the one whose request came first. A flood of requests for one model so delays another
    model's request by one admission, not by the flood."""

    def __init__(self, models: int) -> None:
        self._turns = count(1)
        self._last_turn = [0] * models

    def next(self, heads: Iterable[Sequence]) -> Sequence | None:
        return min(heads, key=lambda seq: (self._last_turn[seq.model], seq.number), default=None)

    def admitted(self, seq: Sequence) -> None:
        self._last_turn[seq.model] = next(self._turns)


def queue_order(deployment: Deployment) -> QueueOrder:
    """The order that ``deployment`` asks for. There is one so far."""
    return ModelsInTurn(len(deployment.models))
