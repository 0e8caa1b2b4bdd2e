"""One request's place in its grammar, followed by threads beside the scheduler's loop.

Nearly every token of nearly every grammar costs less than a tenth of a millisecond. But under an
ambiguous grammar the time for one token grows with the length of the output and with the vocabulary
until it takes minutes, and xgrammar cannot be interrupted. It does release Python's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from crosspool.server.grammar_library import CompiledGrammar, GrammarWalk, NextMask, next_mask

_QUICK_THREADS = 2
_SLOW_SECONDS = 0.005
"""Processor time for one token after which a request's next tokens are left to the slow thread."""
_SECONDS_PER_TOKEN = 0.01
"""Processor time of a token that does not count; a large vocabulary may need as much."""
_FIRST_SHARE = 0.1
"""Part of a request's time that the first token may take. Those of large schemas take 2 ms with a
vocabulary of 128,000 tokens."""


def _beyond(seconds: float) -> float:
    """The part that counts of the processor time of one token."""
    return seconds - _SECONDS_PER_TOKEN


def _takes_too_long(most_seconds: float) -> str:
    return (
        "finding which token may come next has taken more than the server's "
        f"`grammar_mask_timeout`, {most_seconds:g} s; make it less ambiguous"
    )


def first_mask_problem(first: NextMask, most_seconds: float) -> str | None:
    """Why a grammar with this first mask would not be followed for long: what comes before the
    first token is short, so later tokens would hardly take less time than that."""
    if _beyond(first.seconds) <= most_seconds * _FIRST_SHARE:
        return None
    return _takes_too_long(most_seconds) + ": the first one alone took more than a tenth of it"


class MaskThreads:
    """Threads that follow grammars. Requests that have once taken long for a token share one of
    their own, so that they wait for each other and nobody else for them.

    ``most_seconds`` is the processor time that the tokens of a request may take beyond
    :data:`_SECONDS_PER_TOKEN` each; ``on_ready`` is called, from one of the threads, whenever a
    token has been followed."""

    def __init__(self, most_seconds: float, on_ready: Callable[[], None]) -> None:
        self.most_seconds = most_seconds
        self._on_ready = on_ready
        self._quick = ThreadPoolExecutor(_QUICK_THREADS, "masks")
        self._slow = ThreadPoolExecutor(1, "slow masks")
        self._started: list[Future[None]] = []

    def start(self, work: Callable[[], None], *, slow: bool) -> Future[None]:
        future = (self._slow if slow else self._quick).submit(work)
        if not slow:
            self._started.append(future)
        future.add_done_callback(lambda _: self._on_ready())
        return future

    def settle(self, seconds: float) -> None:
        """Waits until what was started since the last call is done, for ``seconds`` at most; work
        of the slow thread is not waited for."""
        started, self._started = self._started, []
        if started:
            wait(started, seconds)


class WalkingMatcher:
    """A GrammarMatcher, of which the ``first`` mask is known. What it says is true only while it is
    not ``pending``."""

    def __init__(self, compiled: CompiledGrammar, first: NextMask, threads: MaskThreads) -> None:
        self._compiled = compiled
        self._threads = threads
        self._walk: GrammarWalk | None = None
        self._next = first
        self._slow = first.seconds > _SLOW_SECONDS
        self._beyond = max(0.0, _beyond(first.seconds))
        """Processor time of the tokens so far that counts."""
        self.accepted = True
        self.error: str | None = None
        self.is_terminated = False
        self.pending = False

    def feed(self, token: int) -> None:
        self.follow([token])

    def follow(self, tokens: Sequence[int]) -> Future[None]:
        """Begins to advance by several tokens; the future is done when it has."""
        self.pending = True
        return self._threads.start(lambda: self._follow(tokens), slow=self._slow)

    def bitmask(self) -> bytes:
        return self._next.mask

    def _follow(self, tokens: Sequence[int]) -> None:
        for token in tokens[:-1]:
            self._take(token, last=False)
            if self.error is not None or not self.accepted:
                break
        else:
            self._take(tokens[-1], last=True)
        self.pending = False

    def _take(self, token: int, *, last: bool) -> None:
        began = time.thread_time()
        try:
            self._advance(token, last=last)
        except ValueError as error:
            self.error = str(error)
        except Exception as error:
            self.error = f"it cannot be followed: {error!r}"
        seconds = time.thread_time() - began
        self._slow = self._slow or seconds > _SLOW_SECONDS
        self._beyond = max(0.0, self._beyond + _beyond(seconds))
        if self._beyond > self._threads.most_seconds:
            self.error = _takes_too_long(self._threads.most_seconds)

    def _advance(self, token: int, *, last: bool) -> None:
        """Accepts ``token`` and finds the mask of the next one, if ``token`` is the ``last``."""
        if self._walk is None:
            self._walk = self._compiled.walk()
        self.accepted = self._walk.accept(token)
        self.is_terminated = self._walk.is_terminated
        if last and self.accepted and not self.is_terminated:
            self._next = next_mask(self._walk)
