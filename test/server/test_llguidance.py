"""llguidance behind the scheduler's protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_choice import compiler_of
from crosspool.server.grammar_source import ANY_JSON, MAX_WHITESPACE
from crosspool.server.grammars import Grammars, ModelGrammars
from support.front_end import MODELS
from support.server import DEMO
from test_grammars_compiled import LIMITS, SPEC, allowed, settled, write
from transformers import AutoTokenizer

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(DEMO / MODELS[0]))


@pytest.fixture(scope="module")
def backend(tokenizer: Any) -> Iterator[ModelGrammars]:
    compiler = compiler_of("llguidance")(tokenizer, SPEC, any_whitespace=False)
    made = Grammars(
        {0: compiler}, lambda *_: compiler, LIMITS, cache_bytes=64 << 20, on_change=lambda: None
    )
    yield ModelGrammars(made, 0)
    made.close()


@pytest.mark.parametrize("pick", [0, 1, 7])
def test_regex(backend: ModelGrammars, tokenizer: Any, pick: int) -> None:
    source = "(cat|dog)s? [0-9]{2}"
    text = write(backend, Grammar(kind="regex", source=source), tokenizer, pick)
    assert re.fullmatch(source, text)


def test_json_schema(backend: ModelGrammars, tokenizer: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yz"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    text = write(backend, Grammar(kind="json_schema", source=json.dumps(schema)), tokenizer)
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("source", ['{"const": {"a": true}}', ANY_JSON])
def test_whitespace_between_the_tokens_of_json_is_bounded(tokenizer: Any, source: str) -> None:
    """A model that writes blanks as long as it may would write nothing else."""
    compiler = compiler_of("llguidance")(tokenizer, SPEC, any_whitespace=True)
    prepared = compiler.prepare(Grammar(kind="json_schema", source=source))
    walk = compiler.build(prepared).walk()
    brace, blank = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("{", "\n"))
    assert walk.accept(brace)
    assert [walk.accept(blank) for _ in range(MAX_WHITESPACE)] == [True] * MAX_WHITESPACE
    assert not walk.accept(blank)


def test_ebnf_and_each_mask_against_the_text_of_every_token(
    backend: ModelGrammars, tokenizer: Any
) -> None:
    words = ["yes", "no", "yesterday"]
    matcher = backend.compile(
        Grammar(kind="ebnf", source='root ::= "yes" | "no" | "yesterday"')
    ).result(30)
    pieces = {token: tokenizer.decode([token]) for token in range(SPEC.vocab)}
    ends = set(tokenizer.all_special_ids) | set(SPEC.eos_token_ids)
    written = ""
    while written not in ("yesterday", "no"):
        expected = {
            token
            for token, piece in pieces.items()
            if token not in ends and piece and any(w.startswith(written + piece) for w in words)
        }
        assert {token for token in allowed(matcher) if token not in ends} == expected
        over = {token for token in allowed(matcher) if token in SPEC.eos_token_ids}
        assert bool(over) == (written in words)
        token = max(expected)
        written += pieces[token]
        matcher.feed(token)
        assert settled(matcher).accepted
    end = next(token for token in allowed(matcher))
    assert end in SPEC.eos_token_ids
    matcher.feed(end)
    assert settled(matcher).accepted and matcher.is_terminated


def test_a_token_that_is_not_allowed_is_refused(backend: ModelGrammars) -> None:
    matcher = backend.compile(Grammar(kind="regex", source="ab")).result(30)
    matcher.feed(next(t for t in range(SPEC.vocab) if t not in allowed(matcher)))
    assert not settled(matcher).accepted


def test_structural_tag(backend: ModelGrammars) -> None:
    tag = {"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}
    old = json.dumps({"structures": [tag], "triggers": ["<f"]})
    assert allowed(backend.compile(Grammar(kind="structural_tag", source=old)).result(30))
    new = json.dumps({"type": "structural_tag", "format": {"type": "any_text"}})
    error = backend.compile(Grammar(kind="structural_tag", source=new)).exception(30)
    assert "`structures`" in str(error)


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("regex", "[a-", "unclosed"),
        ("ebnf", "root ::= nothing", "nothing"),
        ("json_schema", "{bad", "property name"),
        ("json_schema", '{"type": 5}', "string"),
    ],
)
def test_what_is_wrong_is_said(backend: ModelGrammars, kind: Any, source: str, words: str) -> None:
    error = backend.compile(Grammar(kind=kind, source=source)).exception(60)
    assert isinstance(error, ValueError) and words in str(error)
