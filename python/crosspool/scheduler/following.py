"""Requests with a grammar: those whose grammar is being compiled, and those whose grammar follows
their latest token."""

from __future__ import annotations

from collections.abc import Iterator

from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.request import Finish
from crosspool.scheduler.sequence import Sequence
from crosspool.transport.messages import RowResult


def compiled(queue: WaitingQueue) -> Iterator[tuple[Sequence, Finish | None]]:
    """Takes the requests out of the queue whose grammar has been compiled, or cannot be: yields
    each with how it ends, or with None where it is to wait for its turn now."""
    for seq, future in queue.take_compiled():
        grammar, error = seq.request.grammar, future.exception()
        assert grammar is not None
        if error is not None:
            message = f"the {grammar.kind} {grammar.source[:200]!r} cannot be used: {error}"
            yield seq, Finish(kind="abort", message=message, status=400)
        else:
            yield seq, seq.stopping.follow(future.result())


class Following:
    """Requests whose grammar follows a token, each for ``timeout`` seconds at most."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._undecided: list[tuple[Sequence, RowResult, float]] = []
        """With the row that brought the token, and the clock time since when."""

    def begin(self, seq: Sequence, row: RowResult, now: float) -> None:
        """The request waits until its grammar has followed the token of ``row``."""
        seq.undecided = True
        self._undecided.append((seq, row, now))

    def settle(self, now: float) -> Iterator[tuple[Sequence, RowResult, Finish | None]]:
        """Yields the requests that wait no longer: how each ends whose grammar has taken too long,
        and None for each that goes on with its row."""
        undecided, self._undecided = self._undecided, []
        for seq, row, since in undecided:
            if seq.over:
                continue
            if not seq.stopping.pending:
                seq.undecided = False
                yield seq, row, None
            elif now - since < self._timeout:
                self._undecided.append((seq, row, since))
            else:
                message = (
                    "the grammar has not told which token may come next within the server's "
                    f"`grammar_timeout`, {self._timeout:g} s; make it less ambiguous"
                )
                yield seq, row, Finish(kind="abort", message=message, status=400)

    def clear(self) -> None:
        self._undecided.clear()

    def deadlines(self) -> Iterator[float]:
        """Clock times at which a grammar has taken too long."""
        return (since + self._timeout for _, _, since in self._undecided)
