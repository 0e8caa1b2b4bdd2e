"""xgrammar behind the scheduler's protocol."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from crosspool.models.registry import read_model
from crosspool.scheduler.protocols import GrammarMatcher
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar import XGrammarBackend
from support.front_end import MODELS
from support.server import DEMO
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SPEC = read_model(Path(DEMO / MODELS[0]))


@pytest.fixture(scope="module")
def tokenizers() -> list[PreTrainedTokenizerBase]:
    return [AutoTokenizer.from_pretrained(str(DEMO / MODELS[0]))]


@pytest.fixture
def backend(tokenizers: Any) -> XGrammarBackend:
    return XGrammarBackend(tokenizers[0], SPEC, any_whitespace=True, on_compiled=lambda: None)


def allowed(matcher: GrammarMatcher) -> list[int]:
    mask = matcher.fill_bitmask()
    assert len(mask) == 4 * -(-SPEC.vocab // 32)
    return [t for t in range(SPEC.vocab) if mask[t // 8] >> t % 8 & 1]


def write(backend: XGrammarBackend, grammar: Grammar, tokenizer: Any, pick: int = 0) -> str:
    """Follows the grammar, always with the ``pick``-th allowed token; without the end."""
    matcher = backend.compile(grammar).result(30)
    tokens: list[int] = []
    while not matcher.is_terminated():
        choices = allowed(matcher)
        token = next((t for t in SPEC.eos_token_ids if t in choices), choices[pick % len(choices)])
        assert matcher.accept(token)
        if token not in SPEC.eos_token_ids:
            tokens.append(token)
    return str(tokenizer.decode(tokens))


@pytest.mark.parametrize("pick", [0, 1, 7])
def test_regex(backend: XGrammarBackend, tokenizers: Any, pick: int) -> None:
    grammar = Grammar(kind="regex", source="(cat|dog)s? [0-9]{2}")
    assert re.fullmatch("(cat|dog)s? [0-9]{2}", write(backend, grammar, tokenizers[0], pick))


def test_ebnf(backend: XGrammarBackend, tokenizers: Any) -> None:
    grammar = Grammar(kind="ebnf", source='root ::= "yes" | "no"')
    assert write(backend, grammar, tokenizers[0]) in ("yes", "no")


def test_a_token_that_is_not_allowed_is_refused(backend: XGrammarBackend) -> None:
    matcher = backend.compile(Grammar(kind="regex", source="a")).result(30)
    other = next(t for t in range(SPEC.vocab) if t not in allowed(matcher))
    assert not matcher.accept(other)


def test_each_request_has_its_own_matcher(backend: XGrammarBackend) -> None:
    grammar = Grammar(kind="regex", source="ab")
    first, second = (backend.compile(grammar).result(30) for _ in range(2))
    before = second.fill_bitmask()
    assert first.accept(allowed(first)[0])
    assert second.fill_bitmask() == before


def test_structural_tag_in_both_forms(backend: XGrammarBackend) -> None:
    schema = {"type": "object"}
    old = {
        "structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}],
        "triggers": ["<f"],
    }
    tag = {
        "type": "tag",
        "begin": "<f>",
        "content": {"type": "json_schema", "json_schema": schema},
        "end": "</f>",
    }
    new = {"type": "structural_tag", "format": tag}
    for source in (old, new):
        grammar = Grammar(kind="structural_tag", source=json.dumps(source))
        assert allowed(backend.compile(grammar).result(30))


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("regex", "[a-", "Unclosed"),
        ("ebnf", "root ::= nothing", "nothing"),
        ("json_schema", "{bad", "property name"),
        ("json_schema", '{"type": 5}', "string"),
        ("structural_tag", "{}", "format"),
        ("regex", "a" * (300 << 10), "longer"),
    ],
)
def test_what_is_wrong_is_said(
    backend: XGrammarBackend, kind: Any, source: str, words: str
) -> None:
    error = backend.compile(Grammar(kind=kind, source=source)).exception(60)
    assert isinstance(error, ValueError)
    assert words in str(error) and ".cc" not in str(error)


def test_the_loop_is_woken(tokenizers: Any) -> None:
    woken = threading.Event()
    backend = XGrammarBackend(tokenizers[0], SPEC, any_whitespace=True, on_compiled=woken.set)
    backend.compile(Grammar(kind="regex", source="x+"))
    assert woken.wait(30)
