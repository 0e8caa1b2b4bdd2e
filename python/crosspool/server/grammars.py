"""Grammars that constrain output: compiled in a process of their own, kept in one cache."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.protocols import GrammarMatcher
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_children import CompileLimits, MakesModelCompiler
from crosspool.server.grammar_library import CompiledGrammar, GrammarCompiler, NextMask
from crosspool.server.grammar_matcher import MaskThreads, WalkingMatcher
from crosspool.server.grammar_messages import (
    AddCompiler,
    Cancel,
    CompilerAdded,
    FromGrammarProcess,
    GrammarResult,
    Job,
    RemoveCompiler,
)
from crosspool.server.grammar_process import GrammarProcess
from crosspool.server.grammar_source import source_problem

log = logging.getLogger(__name__)

_LARGE_BYTES = 8 << 20
"""Memory for compiling a grammar above which what is left of it is given back at once."""
_GONE = "its model is not served any more"
_BUILDERS = 2
"""Threads that compile what a child has tried: one for each child that works."""

Key = tuple[int, Grammar]
"""A model's number and a grammar."""


@dataclass(frozen=True, kw_only=True)
class KeptGrammar:
    """A compiled grammar with the mask of the first token."""

    grammar: CompiledGrammar
    first: NextMask
    size: int
    """Bytes, the source included."""


class GrammarCache:
    """Compiled grammars of all models, the most recently used ones, ``limit`` bytes at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Key, KeptGrammar] = OrderedDict()
        self.size = 0
        """Bytes of all grammars kept, their sources included."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> KeptGrammar | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def forget(self, model: int) -> None:
        """Gives up the grammars of a model."""
        for key in [key for key in self._kept if key[0] == model]:
            self.size -= self._kept.pop(key).size

    def put(self, key: Key, compiled: KeptGrammar) -> None:
        self._kept[key] = compiled
        self.size += compiled.size
        while self.size > self._limit:
            self.size -= self._kept.popitem(last=False)[1].size


@dataclass(frozen=True)
class _Waiter:
    future: Future[GrammarMatcher]
    output: Sequence[int]
    """Tokens that the matcher is to have followed."""


@dataclass
class _Waiting:
    job: int
    waiters: list[_Waiter] = field(default_factory=list)


class Grammars:
    """The grammars of all models, which come and go. It forks, so it is to be made before the
    first thread; see :class:`GrammarProcess` for ``compilers`` and ``make``.

    ``on_change`` is called, from other threads, whenever a future or the work of a matcher is done,
    and when the compiling process is :attr:`lost`."""

    def __init__(
        self,
        compilers: Mapping[int, GrammarCompiler],
        make: MakesModelCompiler,
        limits: CompileLimits,
        *,
        cache_bytes: int,
        on_change: Callable[[], None],
    ) -> None:
        self._compilers = dict(compilers)
        self._added: dict[int, Future[None]] = {}
        """Models of which the compiling process is about to learn."""
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
            compilers,
            make,
            limits,
            on_told=self._hear,
            on_lost=self._lose,
        )
        self._builders = ThreadPoolExecutor(_BUILDERS, "builders")
        self._threads = MaskThreads(limits.mask_seconds, on_change)

    def settle(self, seconds: float) -> None:
        """See :meth:`MaskThreads.settle`."""
        self._threads.settle(seconds)

    def close(self) -> None:
        self._process.close()

    def add(self, model: int, config: ModelConfig, compiler: GrammarCompiler) -> Future[None]:
        """A further model comes, of which ``compiler`` compiles the grammars in this process. The
        future is done when the compiling process has one as well; its ValueError says why it cannot
        have, with a text for users. Whatever comes of it, :meth:`remove` takes it back."""
        future: Future[None] = Future()
        with self._lock:
            self._compilers[model] = compiler
            self._added[model] = future
        self._process.send(AddCompiler(model=model, config=config))
        return future

    def remove(self, model: int) -> None:
        """A model goes, with its grammars."""
        with self._lock:
            self._compilers.pop(model, None)
            self._added.pop(model, None)
            self.cache.forget(model)
            keys = [key for key in self._waiting if key[0] == model]
            jobs = [self._waiting[key].job for key in keys]
        for job in jobs:
            self._fail(self._done(job), _GONE)
        self._process.send(RemoveCompiler(model=model))

    def compile(
        self, model: int, grammar: Grammar, output: Sequence[int] = ()
    ) -> Future[GrammarMatcher]:
        """See :meth:`GrammarBackend.compile`. Requests with the same grammar share a job."""
        future: Future[GrammarMatcher] = Future()
        if (problem := source_problem(grammar)) is not None:
            future.set_exception(ValueError(problem))
            return future
        key = (model, grammar)
        with self._lock:
            compiled = self.cache.get(key)
            if compiled is None:
                self._wait_for(key, _Waiter(future, output))
        if compiled is None:
            future.add_done_callback(lambda f: self._cancel(key) if f.cancelled() else None)
        else:
            self._give(compiled, [_Waiter(future, output)])
        return future

    def _wait_for(self, key: Key, waiter: _Waiter) -> None:
        waiting = self._waiting.get(key)
        if waiting is None:
            model, grammar = key
            waiting = self._waiting[key] = _Waiting(next(self._jobs))
            self._keys[waiting.job] = key
            self._process.send(Job(id=waiting.job, model=model, grammar=grammar))
        waiting.waiters.append(waiter)

    def _cancel(self, key: Key) -> None:
        """A request that waited for ``key`` has ended."""
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is None or not all(w.future.cancelled() for w in waiting.waiters):
                return
            del self._waiting[key], self._keys[waiting.job]
        self._process.send(Cancel(id=waiting.job))

    # --- in the thread of the compiling process

    def _hear(self, told: FromGrammarProcess) -> None:
        if isinstance(told, GrammarResult):
            return self._take(told)
        return self._take_addition(told)

    def _take_addition(self, told: CompilerAdded) -> None:
        with self._lock:
            future = self._added.pop(told.model, None)
        if future is not None:
            if told.error:
                future.set_exception(ValueError(told.error))
            else:
                future.set_result(None)
            self._on_change()

    def _take(self, result: GrammarResult) -> None:
        with self._lock:
            key = self._keys.get(result.id)
        if key is None:
            return
        if result.error:
            self._fail(self._done(result.id), result.error)
        else:
            self._builders.submit(self._build, key, result)

    def _lose(self) -> None:
        self.lost = True
        self._on_change()

    # --- in a thread of the builders

    def _build(self, key: Key, result: GrammarResult) -> None:
        """Compiles what a child has compiled before, so that its cost is known."""
        model, grammar = key
        assert result.prepared is not None and result.first is not None
        compiler = self._compilers.get(model)
        if compiler is None:
            return self._fail(self._done(result.id), _GONE)
        try:
            built = compiler.build(result.prepared)
        except Exception as error:
            log.exception("a grammar could be compiled once, and not again")
            self._fail(self._done(result.id), f"it cannot be compiled: {error!r}")
            return
        size = built.size + len(grammar.source) + len(result.first.mask)
        compiled = KeptGrammar(grammar=built, first=result.first, size=size)
        with self._lock:
            if model in self._compilers:
                self.cache.put(key, compiled)
        self._give(compiled, self._done(result.id))
        if result.grown_bytes > _LARGE_BYTES:
            ctypes.CDLL(None).malloc_trim(0)

    # --- in any thread

    def _done(self, job: int) -> list[_Waiter]:
        """Forgets the job and returns those that wait for it."""
        with self._lock:
            key = self._keys.pop(job, None)
            return [] if key is None else self._waiting.pop(key).waiters

    def _give(self, compiled: KeptGrammar, waiters: Sequence[_Waiter]) -> None:
        for waiter in waiters:
            if not waiter.future.set_running_or_notify_cancel():
                continue
            matcher = WalkingMatcher(compiled.grammar, compiled.first, self._threads)
            if waiter.output:
                done = partial(self._give_one, waiter.future, matcher)
                matcher.follow(waiter.output).add_done_callback(done)
            else:
                waiter.future.set_result(matcher)
        self._on_change()

    def _give_one(
        self, future: Future[GrammarMatcher], matcher: WalkingMatcher, _: Future[None]
    ) -> None:
        future.set_result(matcher)
        self._on_change()

    def _fail(self, waiters: Sequence[_Waiter], message: str) -> None:
        for waiter in waiters:
            if waiter.future.set_running_or_notify_cancel():
                waiter.future.set_exception(ValueError(message))
        self._on_change()


class ModelGrammars:
    """A GrammarBackend: the grammars of one model."""

    def __init__(self, grammars: Grammars, model: int) -> None:
        self._grammars = grammars
        self._model = model

    def compile(self, grammar: Grammar, output: Sequence[int] = ()) -> Future[GrammarMatcher]:
        return self._grammars.compile(self._model, grammar, output)
