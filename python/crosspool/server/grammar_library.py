"""What a library that constrains output has to do; one module implements it for each library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from crosspool.scheduler.request import Grammar


class GrammarWalk(Protocol):
    """A place in a grammar. Its methods may take long; other threads run meanwhile."""

    def accept(self, token: int) -> bool:
        """Advances by ``token``; returns False where the grammar does not allow it."""
        ...

    @property
    def is_terminated(self) -> bool:
        """Whether no token may follow, not even the end of the sequence."""
        ...

    def mask(self) -> bytes:
        """See :meth:`crosspool.scheduler.protocols.GrammarMatcher.bitmask`."""
        ...


class CompiledGrammar(Protocol):
    """A grammar that requests can follow."""

    @property
    def size(self) -> int:
        """Bytes of memory."""
        ...

    def walk(self) -> GrammarWalk:
        """Returns a place at the beginning."""
        ...


class GrammarCompiler(Protocol):
    """Compiles the grammars of one model."""

    def prepare(self, grammar: Grammar) -> Grammar:
        """Returns ``grammar`` in the form that :meth:`build` takes.

        Raises a ValueError that says what is wrong with it."""
        ...

    def build(self, grammar: Grammar) -> CompiledGrammar:
        """Compiles what :meth:`prepare` has returned; other threads run meanwhile.

        Raises a ValueError that says what is wrong with it, and MemoryError when the process may
        have no more memory."""
        ...


class LaterCompiler:
    """A GrammarCompiler that ``make`` makes when the first grammar asks for it. Reading a
    tokenizer's vocabulary takes some tenths of a second in which no other thread runs, and most
    models that are loaded never get a grammar."""

    def __init__(self, make: Callable[[], GrammarCompiler]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: GrammarCompiler | None = None

    def _compiler(self) -> GrammarCompiler:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def prepare(self, grammar: Grammar) -> Grammar:
        return self._compiler().prepare(grammar)

    def build(self, grammar: Grammar) -> CompiledGrammar:
        return self._compiler().build(grammar)


@dataclass(frozen=True, kw_only=True)
class NextMask:
    """Which tokens may come next."""

    mask: bytes
    seconds: float
    """Processor time that finding it has taken."""


def next_mask(walk: GrammarWalk) -> NextMask:
    """Raises ValueError where no token may follow."""
    began = time.thread_time()
    mask = walk.mask()
    if not any(mask):
        raise ValueError("there is a place in it where no token may follow")
    return NextMask(mask=mask, seconds=time.thread_time() - began)
