"""Who comes in next, and on which attention rank.

Models take turns: the one whose last admission lies furthest back goes first, with its request
that has waited longest; so a flood at one model delays another's request by one admission per
model, not by the flood. A request goes to the rank that has the most of its prompt cached, if that
is worth half of the prompt, and else to the one with the most KV memory that is promised to nobody.
A request that does not fit yet keeps the latter to itself: nobody is admitted there before it, so
large requests get in as running ones end. A request that is in is never put out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.sequence import Sequence


class Admission:
    def __init__(
        self, queues: list[WaitingQueue], ranks: list[RankState], max_running: int
    ) -> None:
        self._queues = queues
        self._ranks = ranks
        self._max_running = max_running
        self._turns = count(1)
        self._last_turn = [0] * len(queues)
        self._exhausted: object = None
        """The state in which nobody more could be admitted."""

    def admit(self) -> Iterator[Sequence]:
        """Moves requests from the queues to the ranks while that is possible; yields each."""
        if self._state() == self._exhausted:
            return
        blocked: set[int] = set()
        kept: set[int] = set()
        while (seq := self._next_in_turn(blocked)) is not None:
            ranks = [
                rank
                for rank in sorted(self._ranks, key=_promised_chunks)
                if rank.index not in kept and len(rank.running[seq.model]) < self._max_running
            ]
            if any(rank.admit(seq) for rank in _by_match(seq, ranks)):
                self._queues[seq.model].remove(seq)
                self._last_turn[seq.model] = next(self._turns)
                yield seq
            else:
                blocked.add(seq.model)
                kept.update(rank.index for rank in ranks[:1])
        self._exhausted = self._state()

    def _state(self) -> object:
        """Who is first in each queue, and the ranks' versions: all that an admission depends on
        besides the admissions before it."""
        heads = [queue.head and queue.head.number for queue in self._queues]
        return heads, [rank.version for rank in self._ranks]

    def _next_in_turn(self, blocked: set[int]) -> Sequence | None:
        heads = [
            queue.head
            for model, queue in enumerate(self._queues)
            if model not in blocked and queue.head is not None
        ]
        return min(heads, key=self._turn, default=None)

    def _turn(self, seq: Sequence) -> tuple[int, int]:
        return self._last_turn[seq.model], seq.number


def _promised_chunks(rank: RankState) -> int:
    return rank.promises.promised_chunks


def _by_match(seq: Sequence, ranks: list[RankState]) -> list[RankState]:
    """``ranks``, first those that have at least half of the prompt cached, the most first."""
    if len(ranks) < 2:
        return ranks
    matched = {rank.index: len(rank.promises.match(seq)) for rank in ranks}
    half = len(seq.page_keys(0, seq.prompt_len)) / 2
    return sorted(ranks, key=lambda r: -matched[r.index] if matched[r.index] >= half else 0)
