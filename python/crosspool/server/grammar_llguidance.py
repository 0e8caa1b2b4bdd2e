"""llguidance, which compiles hardly anything and finds each mask when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, StructTag, grammar_from
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from crosspool.config.errors import ConfigError
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_source import ANY_JSON, MAX_WHITESPACE, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES_PER_CHARACTER = 64
_LEAST_BYTES = 16 << 10
"""Memory of a compiled grammar, of which llguidance does not tell: JSON schemas of 5 and of 300
properties took 47 and 60 bytes for each character of their source, 15 kB and 1 MB."""


class LLGuidanceCompiler:
    """A GrammarCompiler. ``any_whitespace`` allows whitespace between the tokens of JSON."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, *, any_whitespace: bool
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(
                "grammar_backend: llguidance needs fast tokenizers, and that of "
                f"{tokenizer.name_or_path} is slow"
            )
        self._tokenizer = from_tokenizer(
            tokenizer, n_vocab=spec.vocab, eos_token=list(spec.eos_token_ids)
        )
        self._any_whitespace = any_whitespace

    def prepare(self, grammar: Grammar) -> Grammar:
        return Grammar(kind=grammar.kind, source=self._prepared(grammar))

    def _prepared(self, grammar: Grammar) -> str:
        if grammar.kind in ("regex", "ebnf"):
            return str(grammar_from(grammar.kind, grammar.source))
        if grammar.source == ANY_JSON:
            return self._json("{}")
        parsed = parse_json(grammar.source)
        if grammar.kind == "json_schema":
            return self._json(grammar.source)
        return _structural_tag(parsed)

    def _json(self, schema: str) -> str:
        defaults: Any = {"whitespace_flexible": self._any_whitespace}
        if self._any_whitespace:
            defaults["whitespace_pattern"] = rf"[ \n\r\t]{{0,{MAX_WHITESPACE}}}"
        return str(LLMatcher.grammar_from_json_schema(schema, defaults=defaults))

    def build(self, grammar: Grammar) -> LLGuidanceCompiled:
        matcher = LLMatcher(self._tokenizer, grammar.source, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return LLGuidanceCompiled(
            matcher, frozenset(self._tokenizer.eos_tokens), self._tokenizer.vocab_size, grammar
        )


def _structural_tag(tag: Any) -> str:
    try:
        tags = [
            StructTag(
                trigger=next(t for t in tag["triggers"] if structure["begin"].startswith(t)),
                begin=structure["begin"],
                grammar=structure.get("schema") or {},
                end=structure["end"],
            )
            for structure in tag["structures"]
        ]
        return str(StructTag.to_grammar(tags))
    except (KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
        raise ValueError(
            "llguidance takes structural tags with `structures`, each with a `begin` that starts "
            f"with one of the `triggers`, and an `end`: {error!r}"
        ) from error


class LLGuidanceCompiled:
    """A CompiledGrammar."""

    def __init__(
        self, matcher: LLMatcher, ends: frozenset[int], vocab: int, grammar: Grammar
    ) -> None:
        self._matcher = matcher
        self._ends = ends
        self._vocab = vocab
        self.size = _LEAST_BYTES + len(grammar.source) * _BYTES_PER_CHARACTER

    def walk(self) -> LLGuidanceWalk:
        return LLGuidanceWalk(self._matcher.deep_copy(), self._ends, self._vocab)


class LLGuidanceWalk:
    """A GrammarWalk."""

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], vocab: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self._bytes = 4 * -(-vocab // 32)
        self.is_terminated = False

    def accept(self, token: int) -> bool:
        if token in self._ends:
            self.is_terminated = bool(self._matcher.is_accepting())
            return self.is_terminated
        accepted = bool(self._matcher.try_consume_tokens([token]) == 1)
        self._check()
        return accepted

    def mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        self._check()
        return bytes(mask[: self._bytes])

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
