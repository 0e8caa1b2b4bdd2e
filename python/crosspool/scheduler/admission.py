"""Who is admitted next, and to which attention rank.

The order of the queues (:mod:`crosspool.scheduler.queue_order`) says which model's first request is
tried next. It goes to the rank that has the most of its prompt cached, if that is at least half of
the prompt, and else to the rank with the least KV memory promised. A request that does not fit
anywhere keeps the latter rank to itself: nobody is admitted there before it, so that large requests
get in as running ones end. An admitted request is never evicted. If its rank is lost, it is
admitted again before any that has only waited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from crosspool.scheduler.queue_order import QueueOrder
from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.sequence import Sequence


class Admission:
    def __init__(
        self,
        queues: Mapping[int, WaitingQueue],
        order: QueueOrder,
        ranks: list[RankState],
        max_running: int,
    ) -> None:
        """``queues``: by the model, those that there are at any time. ``max_running``: requests of
        one model that may run on one rank at once."""
        self._queues = queues
        self._order = order
        self._ranks = ranks
        self._max_running = max_running
        self._exhausted: object = None
        """The state in which nobody more could be admitted."""

    def admit(self) -> Iterator[Sequence]:
        """Moves requests from the queues to the ranks while that is possible; yields each."""
        if self._state() == self._exhausted:
            return
        blocked: set[int] = set()
        kept: set[int] = set()
        while (seq := self._order.next(self._heads(blocked))) is not None:
            ranks = [
                rank
                for rank in sorted(self._ranks, key=_promised_chunks)
                if not rank.away
                and seq.model not in rank.barred
                and rank.index not in kept
                and len(rank.running[seq.model]) < self._max_running
            ]
            if any(rank.admit(seq) for rank in _by_match(seq, ranks)):
                self._queues[seq.model].remove(seq)
                self._order.admitted(seq)
                yield seq
            else:
                blocked.add(seq.model)
                kept.update(rank.index for rank in ranks[:1])
        self._exhausted = self._state()

    def _state(self) -> object:
        """The first request of each queue and the ranks' versions: everything that an admission
        depends on besides the admissions before it."""
        heads = [(n, queue.head and queue.head.number) for n, queue in self._queues.items()]
        return heads, [rank.version for rank in self._ranks]

    def _heads(self, blocked: set[int]) -> list[Sequence]:
        """The first request of each queue that is not blocked; only replayed ones, if there are."""
        heads = [
            queue.head
            for model, queue in self._queues.items()
            if model not in blocked and queue.head is not None
        ]
        return [seq for seq in heads if seq.replayed] or heads


def _promised_chunks(rank: RankState) -> int:
    return rank.promises.promised_chunks


def _by_match(seq: Sequence, ranks: list[RankState]) -> list[RankState]:
    """``ranks`` in the order in which to try them: first those that have at least half of the
    prompt cached, the one with the most at the head."""
    if len(ranks) < 2:
        return ranks
    matched = {rank.index: len(rank.promises.match(seq)) for rank in ranks}
    half = len(seq.page_keys(0, seq.prompt_len)) / 2
    return sorted(ranks, key=lambda r: -matched[r.index] if matched[r.index] >= half else 0)
