"""One request's place in its grammar, followed by threads beside the scheduler's loop.

Nearly every token of nearly every grammar costs less than a tenth of a millisecond. But under an
ambiguous grammar the time for one token grows with the length of the output and with the vocabulary
until it takes minutes, and xgrammar cannot be interrupted. It does release Python's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
import xgrammar

_QUICK_THREADS = 2
_SLOW_SECONDS = 0.005
"""Processor time for one token after which a request's next tokens are left to the slow thread."""
_SECONDS_PER_TOKEN = 0.01
"""Processor time of a token that does not count; a large vocabulary may need as much."""


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


class XGrammarMatcher:
    """A GrammarMatcher. What it says is true only while it is not ``pending``."""

    def __init__(
        self, compiled: xgrammar.CompiledGrammar, vocab: int, threads: MaskThreads
    ) -> None:
        self._compiled = compiled
        self._vocab = vocab
        self._threads = threads
        self._matcher: xgrammar.GrammarMatcher | None = None
        self._mask = b""
        self._slow = False
        self._beyond = 0.0
        """Processor time of the tokens so far that counts."""
        self.accepted = True
        self.error: str | None = None
        self.is_terminated = False
        self.pending = True

    def start(self) -> Future[None]:
        """Begins to find which tokens may come first; to be called once, before anything else."""
        return self._threads.start(lambda: self._follow(None), slow=False)

    def feed(self, token: int) -> None:
        self.pending = True
        self._threads.start(lambda: self._follow(token), slow=self._slow)

    def bitmask(self) -> bytes:
        return self._mask

    def _follow(self, token: int | None) -> None:
        began = time.thread_time()
        try:
            self._advance(token)
        except Exception as error:
            self.error = f"xgrammar cannot follow it: {error!r}"
        seconds = time.thread_time() - began
        self._slow = self._slow or seconds > _SLOW_SECONDS
        self._beyond = max(0.0, self._beyond + seconds - _SECONDS_PER_TOKEN)
        if self._beyond > self._threads.most_seconds:
            self.error = (
                "finding which token may come next has taken more than the server's "
                f"`grammar_mask_timeout`, {self._threads.most_seconds:g} s; make it less ambiguous"
            )
        self.pending = False

    def _advance(self, token: int | None) -> None:
        if self._matcher is None:
            self._matcher = xgrammar.GrammarMatcher(self._compiled)
        if token is not None:
            self.accepted = bool(self._matcher.accept_token(token))
        self.is_terminated = bool(self._matcher.is_terminated())
        if self.accepted and not self.is_terminated:
            shape = xgrammar.get_bitmask_shape(1, self._vocab)
            mask = torch.full(shape, -1, dtype=torch.int32)
            self._matcher.fill_next_token_bitmask(mask)
            self._mask = mask.numpy().tobytes()
            if not any(self._mask):
                self.error = "there is a place in it where no token may follow"
