"""What each kind of a grammar's source text means to xgrammar, and bounds on the text."""

from __future__ import annotations

import json
import re
from typing import Any

import xgrammar

from crosspool.scheduler.request import Grammar

MAX_SOURCE_CHARACTERS = 256 << 10
"""A longer grammar is refused before anything reads it."""
MAX_DEPTH = 128
"""Most levels of lists and objects in the JSON of a schema or structural tag. Compiling takes time
that grows with the third power of the depth: 200 nested objects, which are 400 levels, took 4 s."""
MAX_WHITESPACE = 16
"""Most whitespace characters between two tokens of JSON: enough for indentation, and a model that
would go on writing blanks until its tokens run out cannot."""

_NATIVE_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")
"""The place in xgrammar's source with which its error messages begin."""


def source_problem(grammar: Grammar) -> str | None:
    """What is wrong with the source before any compiler reads it."""
    if len(grammar.source) > MAX_SOURCE_CHARACTERS:
        return f"it is longer than {MAX_SOURCE_CHARACTERS} characters"
    try:
        grammar.source.encode()
    except UnicodeEncodeError as error:
        return f"it is no Unicode text: {error.reason} at position {error.start}"
    return None


def compile_source(
    compiler: xgrammar.GrammarCompiler, grammar: Grammar, *, any_whitespace: bool
) -> xgrammar.CompiledGrammar:
    """Raises a ValueError that says what is wrong with ``grammar``, and MemoryError when the
    process may have no more memory."""
    try:
        return _compile(compiler, grammar, any_whitespace)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except RuntimeError as error:
        if "bad_alloc" in str(error):
            raise MemoryError from error
        raise ValueError(_NATIVE_PLACE.sub("", str(error)).strip()) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not built as it should be: {error!r}") from error


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def _compile(
    compiler: xgrammar.GrammarCompiler, grammar: Grammar, any_whitespace: bool
) -> xgrammar.CompiledGrammar:
    if grammar.kind == "regex":
        return compiler.compile_regex(grammar.source)
    if grammar.kind == "ebnf":
        return compiler.compile_grammar(grammar.source)
    if grammar.kind == "json_schema" and grammar.source == "$$ANY$$":
        return compiler.compile_builtin_json_grammar()
    parsed = json.loads(grammar.source)
    if _depth(parsed) > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    if grammar.kind == "structural_tag":
        return compiler.compile_structural_tag(_structural_tag(parsed))
    return compiler.compile_json_schema(
        grammar.source,
        any_whitespace=any_whitespace,
        max_whitespace_cnt=MAX_WHITESPACE if any_whitespace else None,
    )


def _depth(node: Any) -> int:
    depth, level = 0, [node]
    while level := [n for n in level if isinstance(n, dict | list)]:
        depth += 1
        level = [c for n in level for c in (n.values() if isinstance(n, dict) else n)]
    return depth


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
