"""Which library compiles grammars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from crosspool.models.spec import ModelSpec
from crosspool.server.grammar_library import GrammarCompiler
from crosspool.server.grammar_xgrammar import XGrammarCompiler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MakesCompiler(Protocol):
    """The class of a library's GrammarCompiler."""

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, *, any_whitespace: bool
    ) -> GrammarCompiler: ...


def compiler_of(backend: str) -> MakesCompiler:
    """``backend`` is a value of ``--grammar-backend``; its library is imported."""
    if backend == "llguidance":
        from crosspool.server.grammar_llguidance import LLGuidanceCompiler

        return LLGuidanceCompiler
    return XGrammarCompiler
