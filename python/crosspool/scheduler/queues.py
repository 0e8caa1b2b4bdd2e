"""The waiting requests of one model: first come, first served, bounded in number and in time."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import chain

from crosspool.scheduler.protocols import GrammarMatcher
from crosspool.scheduler.sequence import Sequence

_MOVES = 64
"""Admissions by which the pace of a queue is measured."""


class WaitingQueue:
    """Requests in the order of their numbers, ``bound`` at most. A request whose grammar is being
    compiled waits beside the queue and takes its place in the order when that is done; it counts
    for the bound. Requests that come back from a lost rank or an earlier scheduler go before all
    others; they count neither for the bound nor for any deadline."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._returned: dict[int, Sequence] = {}
        """Requests that have come back, by their numbers, ascending."""
        self._ready: dict[int, Sequence] = {}
        self._order: list[int] = []
        """Heap of the numbers in ``_ready``, and of some requests that have left it."""
        self._compiling: dict[int, tuple[Sequence, Future[GrammarMatcher]]] = {}
        self._stalled_at: float | None = None
        """Clock time since when the queue has never been empty; None while it is."""
        self._moves: deque[float] = deque(maxlen=_MOVES)
        """Clock times of the latest admissions since ``_stalled_at``."""

    def __len__(self) -> int:
        return len(self._returned) + len(self._ready) + len(self._compiling)

    def __contains__(self, seq: Sequence) -> bool:
        places = (self._returned, self._ready, self._compiling)
        return any(seq.number in place for place in places)

    def __iter__(self) -> Iterator[Sequence]:
        compiling = (seq for seq, _ in self._compiling.values())
        return chain(self._returned.values(), self._ready.values(), compiling)

    def moved(self, now: float) -> None:
        """A request was admitted at clock time ``now``."""
        if self._stalled_at is not None:
            self._moves.append(now)

    def look(self, now: float) -> None:
        """Nobody more can be admitted at clock time ``now``; requests that are still here wait."""
        if self.head is None:
            if self._stalled_at is not None:
                self._stalled_at = None
                self._moves.clear()
        elif self._stalled_at is None:
            self._stalled_at = now

    def drain_seconds(self, now: float) -> float:
        """Estimated seconds until every waiting request is admitted, at the pace of the latest
        admissions since the queue was last empty. Without any admission since, the next one is
        taken to be due now. Requests that came into an empty queue say nothing about the pace."""
        if self._stalled_at is None:
            return 0.0
        since = self._moves[0] if len(self._moves) == _MOVES else self._stalled_at
        return len(self) * (now - since) / max(1, len(self._moves))

    @property
    def compiling(self) -> int:
        return len(self._compiling)

    @property
    def full(self) -> bool:
        compiling = sum(not seq.replayed for seq, _ in self._compiling.values())
        return len(self._ready) + compiling >= self._bound

    @property
    def head(self) -> Sequence | None:
        """The request to admit next; it is none of those that are being compiled."""
        if not self._returned and not self._ready:  # as of most models, whenever anything happens
            return None
        return next(iter(self._returned.values()), None) or self._first_ready

    @property
    def _first_ready(self) -> Sequence | None:
        while self._order and self._order[0] not in self._ready:
            heapq.heappop(self._order)
        return self._ready[self._order[0]] if self._order else None

    @property
    def oldest(self) -> Sequence | None:
        """The request that is the next to reach its deadline."""
        if not self._ready and not self._compiling:
            return None
        new = (seq for seq, _ in self._compiling.values() if not seq.replayed)
        compiling, ready = next(new, None), self._first_ready
        if compiling is None or (ready and ready.number < compiling.number):
            return ready
        return compiling

    def push(self, seq: Sequence) -> None:
        """Queues ``seq``, before all others if it comes back."""
        if seq.replayed:
            self.give_back([seq])
        else:
            self._ready[seq.number] = seq
            heapq.heappush(self._order, seq.number)

    def give_back(self, seqs: Iterable[Sequence]) -> None:
        """Takes requests back that have been admitted before."""
        self._returned |= {seq.number: seq for seq in seqs}
        self._returned = dict(sorted(self._returned.items()))

    def push_after(self, seq: Sequence, grammar: Future[GrammarMatcher]) -> None:
        """Queues ``seq`` once its ``grammar`` is compiled."""
        self._compiling[seq.number] = (seq, grammar)

    def take_compiled(self) -> list[tuple[Sequence, Future[GrammarMatcher]]]:
        """Removes and returns the requests whose grammar is compiled or has failed to compile."""
        done = [entry for entry in self._compiling.values() if entry[1].done()]
        for seq, _ in done:
            del self._compiling[seq.number]
        return done

    def remove(self, seq: Sequence) -> None:
        place = self._returned if seq.number in self._returned else self._ready
        if place.pop(seq.number, None) is None:
            _, grammar = self._compiling.pop(seq.number)
            grammar.cancel()
