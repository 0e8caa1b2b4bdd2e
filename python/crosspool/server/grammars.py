"""Grammars that constrain output: compiled in a process of their own, kept in one cache."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import xgrammar

from crosspool.models.spec import ModelSpec
from crosspool.scheduler.protocols import GrammarMatcher
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_matcher import MaskThreads, XGrammarMatcher
from crosspool.server.grammar_process import (
    Cancel,
    CompileLimits,
    GrammarProcess,
    GrammarResult,
    Job,
)
from crosspool.server.grammar_source import source_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGE_CHARACTERS = 4 << 20
"""Reading a longer serialized grammar leaves so much free memory that it is given back at once."""

Key = tuple[int, Grammar]
"""A model's index and a grammar."""


class GrammarCache:
    """Compiled grammars of all models, the most recently used ones, ``limit`` bytes at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Key, tuple[xgrammar.CompiledGrammar, int]] = OrderedDict()
        self.size = 0
        """Bytes of all grammars kept, their sources included."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> xgrammar.CompiledGrammar | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Key, compiled: xgrammar.CompiledGrammar, size: int) -> None:
        self._kept[key] = (compiled, size)
        self.size += size
        while self.size > self._limit:
            self.size -= self._kept.popitem(last=False)[1][1]


@dataclass
class _Waiting:
    job: int
    futures: list[Future[GrammarMatcher]] = field(default_factory=list)


class Grammars:
    """The grammars of all models. It forks, so it is to be made before the first thread.

    ``on_change`` is called, from other threads, whenever a future or the work of a matcher is done,
    and when the compiling process is :attr:`lost`."""

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        specs: Sequence[ModelSpec],
        limits: CompileLimits,
        *,
        mask_seconds: float,
        cache_bytes: int,
        any_whitespace: bool,
        on_change: Callable[[], None],
    ) -> None:
        self._infos = [
            xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=spec.vocab, stop_token_ids=list(spec.eos_token_ids)
            )
            for tokenizer, spec in zip(tokenizers, specs, strict=True)
        ]
        self._vocabs = [spec.vocab for spec in specs]
        self._on_change = on_change
        self.lost = False
        """Whether the compiling process has ended, so that no grammar can be compiled any more."""
        self.cache = GrammarCache(cache_bytes)
        self._waiting: dict[Key, _Waiting] = {}
        self._keys: dict[int, Key] = {}
        """What each job compiles."""
        self._jobs = count()
        self._lock = threading.Lock()
        self._process = GrammarProcess(
            self._infos,
            limits,
            any_whitespace=any_whitespace,
            on_compiled=self._take,
            on_lost=self._lose,
        )
        self._threads = MaskThreads(mask_seconds, on_change)

    def settle(self, seconds: float) -> None:
        """See :meth:`MaskThreads.settle`."""
        self._threads.settle(seconds)

    def close(self) -> None:
        self._process.close()

    def compile(self, model: int, grammar: Grammar) -> Future[GrammarMatcher]:
        """See :meth:`GrammarBackend.compile`. Requests with the same grammar share a job."""
        future: Future[GrammarMatcher] = Future()
        if (problem := source_problem(grammar)) is not None:
            future.set_exception(ValueError(problem))
            return future
        key = (model, grammar)
        with self._lock:
            compiled = self.cache.get(key)
            if compiled is None:
                self._wait_for(key, future)
        if compiled is None:
            future.add_done_callback(lambda f: self._cancel(key) if f.cancelled() else None)
        else:
            self._give(model, compiled, [future])
        return future

    def _wait_for(self, key: Key, future: Future[GrammarMatcher]) -> None:
        waiting = self._waiting.get(key)
        if waiting is None:
            model, grammar = key
            waiting = self._waiting[key] = _Waiting(next(self._jobs))
            self._keys[waiting.job] = key
            self._process.send(
                Job(id=waiting.job, model=model, kind=grammar.kind, source=grammar.source)
            )
        waiting.futures.append(future)

    def _cancel(self, key: Key) -> None:
        """A request that waited for ``key`` has ended."""
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is None or not all(future.cancelled() for future in waiting.futures):
                return
            del self._waiting[key], self._keys[waiting.job]
        self._process.send(Cancel(id=waiting.job))

    # --- in the thread of the compiling process

    def _take(self, result: GrammarResult) -> None:
        with self._lock:
            key = self._keys.get(result.id)
        if key is None:
            return
        model, grammar = key
        compiled: xgrammar.CompiledGrammar | None = None
        if result.serialized is not None:
            compiled = xgrammar.CompiledGrammar.deserialize_json(
                result.serialized, self._infos[model]
            )
        with self._lock:
            futures = []
            if self._keys.pop(result.id, None) is not None:
                futures = self._waiting.pop(key).futures
            if compiled is not None:
                size = compiled.memory_size_bytes + len(grammar.source)
                self.cache.put(key, compiled, size)
        if compiled is not None:
            self._give(model, compiled, futures)
        else:
            self._fail(futures, result.error)
        if result.serialized is not None and len(result.serialized) > _LARGE_CHARACTERS:
            ctypes.CDLL(None).malloc_trim(0)

    def _lose(self) -> None:
        self.lost = True
        self._on_change()

    # --- in any thread

    def _give(
        self,
        model: int,
        compiled: xgrammar.CompiledGrammar,
        futures: Sequence[Future[GrammarMatcher]],
    ) -> None:
        """Gives each request a matcher, once that has the mask of the first token."""
        for future in futures:
            matcher = XGrammarMatcher(compiled, self._vocabs[model], self._threads)

            def done(
                _: Future[None],
                future: Future[GrammarMatcher] = future,
                matcher: XGrammarMatcher = matcher,
            ) -> None:
                if matcher.error is not None:
                    self._fail([future], matcher.error)
                elif future.set_running_or_notify_cancel():
                    future.set_result(matcher)
                    self._on_change()

            matcher.start().add_done_callback(done)

    def _fail(self, futures: Sequence[Future[GrammarMatcher]], message: str) -> None:
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(ValueError(message))
        self._on_change()


class ModelGrammars:
    """A GrammarBackend: the grammars of one model."""

    def __init__(self, grammars: Grammars, model: int) -> None:
        self._grammars = grammars
        self._model = model

    def compile(self, grammar: Grammar) -> Future[GrammarMatcher]:
        return self._grammars.compile(self._model, grammar)
