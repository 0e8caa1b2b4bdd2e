"""Grammars that constrain output, compiled and followed by xgrammar."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import xgrammar

from crosspool.models.spec import ModelSpec
from crosspool.scheduler.protocols import GrammarMatcher
from crosspool.scheduler.request import Grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_GRAMMARS = 256
"""Number of compiled grammars that each model keeps, the most recently used ones."""
MAX_SOURCE_CHARACTERS = 256 << 10
"""A longer grammar is refused: compiling it would take minutes and gigabytes."""
MAX_WHITESPACE = 16
"""Most whitespace characters between two tokens of JSON: enough for indentation, and a model that
would go on writing blanks until its tokens run out cannot."""

_NATIVE_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")
"""The place in xgrammar's source with which its error messages begin."""

executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
"""One thread compiles the grammars of every model. xgrammar releases Python's lock meanwhile, and
more threads would take cores from the ranks."""


class XGrammarMatcher:
    """A GrammarMatcher: one request's place in a compiled grammar."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab: int) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = torch.full(xgrammar.get_bitmask_shape(1, vocab), -1, dtype=torch.int32)

    def fill_bitmask(self) -> bytes:
        self._bitmask.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._bitmask)
        return self._bitmask.numpy().tobytes()

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def is_terminated(self) -> bool:
        return bool(self._matcher.is_terminated())


class XGrammarBackend:
    """A GrammarBackend for one model.

    ``on_compiled`` is called, from the compiling thread, whenever a future is done."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: ModelSpec,
        *,
        any_whitespace: bool,
        on_compiled: Callable[[], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._any_whitespace = any_whitespace
        self._on_compiled = on_compiled
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._compiled: OrderedDict[Grammar, xgrammar.CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Future[GrammarMatcher]:
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is not None:
            done: Future[GrammarMatcher] = Future()
            done.set_result(XGrammarMatcher(compiled, self._spec.vocab))
            return done
        future: Future[GrammarMatcher] = executor.submit(self._compile, grammar)
        future.add_done_callback(lambda _: self._on_compiled())
        return future

    def _compile(self, grammar: Grammar) -> GrammarMatcher:
        """Raises a ValueError that says what is wrong with ``grammar``."""
        if len(grammar.source) > MAX_SOURCE_CHARACTERS:
            raise ValueError(f"it is longer than {MAX_SOURCE_CHARACTERS} characters")
        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer,
                vocab_size=self._spec.vocab,
                stop_token_ids=list(self._spec.eos_token_ids),
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        try:
            compiled = _compile(self._compiler, grammar, self._any_whitespace)
        except (RuntimeError, KeyError, TypeError) as error:
            raise ValueError(_NATIVE_PLACE.sub("", str(error)).strip()) from error
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return XGrammarMatcher(compiled, self._spec.vocab)


def _compile(
    compiler: xgrammar.GrammarCompiler, grammar: Grammar, any_whitespace: bool
) -> xgrammar.CompiledGrammar:
    if grammar.kind == "regex":
        return compiler.compile_regex(grammar.source)
    if grammar.kind == "ebnf":
        return compiler.compile_grammar(grammar.source)
    if grammar.kind == "structural_tag":
        return compiler.compile_structural_tag(_structural_tag(grammar.source))
    if grammar.source == "$$ANY$$":
        return compiler.compile_builtin_json_grammar()
    json.loads(grammar.source)
    return compiler.compile_json_schema(
        grammar.source,
        any_whitespace=any_whitespace,
        max_whitespace_cnt=MAX_WHITESPACE if any_whitespace else None,
    )


def _structural_tag(source: str) -> str:
    """Takes both forms that SGLang sends: ``structures`` with ``triggers``, and xgrammar's own."""
    tag: dict[str, Any] = json.loads(source)
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
    """RequestBounds the whitespace of every JSON content in a structural tag."""
    if isinstance(node, list):
        for child in node:
            _bound_whitespace(child)
    elif isinstance(node, dict):
        if "json_schema" in node:
            node.setdefault("max_whitespace_cnt", MAX_WHITESPACE)
        for key, child in node.items():
            if key != "json_schema":
                _bound_whitespace(child)
