"""xgrammar, which compiles a grammar to an automaton with the masks of most of its states."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
import xgrammar

from crosspool.models.spec import ModelSpec
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_source import ANY_JSON, MAX_WHITESPACE, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NATIVE_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")
"""The place in xgrammar's source with which its error messages begin."""


class XGrammarCompiler:
    """A GrammarCompiler. ``any_whitespace`` allows whitespace between the tokens of JSON."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, *, any_whitespace: bool
    ) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=spec.vocab, stop_token_ids=list(spec.eos_token_ids)
        )
        self._vocab = spec.vocab
        self._any_whitespace = any_whitespace
        self._native = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def prepare(self, grammar: Grammar) -> Grammar:
        if grammar.kind in ("regex", "ebnf") or grammar.source == ANY_JSON:
            return grammar
        parsed = parse_json(grammar.source)
        if grammar.kind == "json_schema":
            return grammar
        try:
            return Grammar(kind="structural_tag", source=_structural_tag(parsed))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not built as it should be: {error!r}") from error

    def build(self, grammar: Grammar) -> XGrammarCompiled:
        try:
            return XGrammarCompiled(self._compile(grammar), self._vocab)
        except RuntimeError as error:
            if "bad_alloc" in str(error):
                raise MemoryError from error
            raise ValueError(_NATIVE_PLACE.sub("", str(error)).strip()) from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not built as it should be: {error!r}") from error

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        if grammar.kind == "regex":
            return self._native.compile_regex(grammar.source)
        if grammar.kind == "ebnf":
            return self._native.compile_grammar(grammar.source)
        if grammar.kind == "structural_tag":
            return self._native.compile_structural_tag(grammar.source)
        if grammar.source == ANY_JSON:
            return self._native.compile_builtin_json_grammar()
        return self._native.compile_json_schema(
            grammar.source,
            any_whitespace=self._any_whitespace,
            max_whitespace_cnt=MAX_WHITESPACE if self._any_whitespace else None,
        )


class XGrammarCompiled:
    """A CompiledGrammar."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab: int) -> None:
        self._compiled = compiled
        self._vocab = vocab
        self.size: int = compiled.memory_size_bytes

    def walk(self) -> XGrammarWalk:
        return XGrammarWalk(xgrammar.GrammarMatcher(self._compiled), self._vocab)


class XGrammarWalk:
    """A GrammarWalk."""

    def __init__(self, matcher: xgrammar.GrammarMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._shape = xgrammar.get_bitmask_shape(1, vocab)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    @property
    def is_terminated(self) -> bool:
        return bool(self._matcher.is_terminated())

    def mask(self) -> bytes:
        mask = torch.full(self._shape, -1, dtype=torch.int32)
        self._matcher.fill_next_token_bitmask(mask)
        return mask.numpy().tobytes()


def _structural_tag(tag: dict[str, Any]) -> str:
    """Takes both forms that SGLang sends: ``structures`` with ``triggers``, and xgrammar's own."""
    if "structures" not in tag:
        _bound_whitespace(tag)
        return json.dumps(tag)
    tags = [
        {
            "type": "tag",
            "begin": structure["begin"],
            "content": {"type": "json_schema", "json_schema": structure.get("schema") or {}},
            "end": structure["end"],
        }
        for structure in tag["structures"]
    ]
    triggered = {
        "type": "triggered_tags",
        "triggers": tag["triggers"],
        "tags": tags,
        "at_least_one": tag.get("at_least_one", False),
    }
    _bound_whitespace(triggered)
    return json.dumps({"type": "structural_tag", "format": triggered})


def _bound_whitespace(node: Any) -> None:
    """Bounds the whitespace of every JSON content in a structural tag."""
    if isinstance(node, list):
        for child in node:
            _bound_whitespace(child)
    elif isinstance(node, dict):
        if "json_schema" in node:
            node.setdefault("max_whitespace_cnt", MAX_WHITESPACE)
        for key, child in node.items():
            if key != "json_schema":
                _bound_whitespace(child)
