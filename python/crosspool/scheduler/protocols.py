"""What the scheduler needs from outside to follow text and grammars; ``server/`` implements it with
the models' tokenizers and xgrammar."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from crosspool.models.spec import ModelSpec
from crosspool.scheduler.request import Grammar


class TextDecoder(Protocol):
    """One model's tokenizer, as far as stop strings need it."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``. Bytes that are no complete character yet come out as U+FFFD."""
        ...


class GrammarMatcher(Protocol):
    """One request's place in its grammar. While it is ``pending``, nothing else of it holds."""

    @property
    def pending(self) -> bool:
        """Whether it has yet to follow the latest token."""
        ...

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further; None while it can."""
        ...

    @property
    def accepted(self) -> bool:
        """Whether the grammar allows the latest token."""
        ...

    @property
    def is_terminated(self) -> bool:
        """Whether the output is complete and no token may follow."""
        ...

    def feed(self, token: int) -> None:
        """Begins to advance by one sampled token."""
        ...

    def bitmask(self) -> bytes:
        """Tokens allowed next: ceil(vocab / 32) little-endian int32 words, token t is bit
        ``t % 32`` of word ``t // 32``."""
        ...


class GrammarBackend(Protocol):
    """One model's grammar compiler."""

    def compile(self, grammar: Grammar, output: Sequence[int] = ()) -> Future[GrammarMatcher]:
        """Starts to compile ``grammar`` and returns at once. The future gives a matcher for one
        request, which has followed the tokens of ``output`` and is not pending; its exception says
        what is wrong with the grammar."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelTools:
    """What the scheduler knows of one model besides its options."""

    spec: ModelSpec
    decoder: TextDecoder
    grammars: GrammarBackend
    think_end: tuple[int, ...] = ()
    """Tokens with which the model's thinking ends; empty where nothing tells its end."""
