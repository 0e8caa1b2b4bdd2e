"""xgrammar behind the scheduler's protocol."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from crosspool.models.registry import read_model
from crosspool.scheduler.protocols import GrammarMatcher
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_children import CompileLimits
from crosspool.server.grammar_library import NextMask
from crosspool.server.grammar_xgrammar import XGrammarCompiler
from crosspool.server.grammars import Grammars, KeptGrammar, ModelGrammars
from support.front_end import MODELS
from support.server import DEMO
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SPEC = read_model(Path(DEMO / MODELS[0]))


@pytest.fixture(scope="module")
def tokenizers() -> list[PreTrainedTokenizerBase]:
    return [AutoTokenizer.from_pretrained(str(DEMO / MODELS[0]))]


LIMITS = CompileLimits(seconds=1.5, memory_bytes=256 << 20, mask_seconds=0.5)


@contextlib.contextmanager
def grammars(tokenizer: Any, **changes: Any) -> Iterator[Grammars]:
    """Grammars of two models."""
    fields: dict[str, Any] = {
        "limits": LIMITS,
        "cache_bytes": 64 << 20,
        "on_change": lambda: None,
    }
    compiler = XGrammarCompiler(tokenizer, SPEC, any_whitespace=True)
    made = Grammars({0: compiler, 1: compiler}, lambda *_: compiler, **(fields | changes))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def backend(tokenizers: Any) -> Iterator[ModelGrammars]:
    with grammars(tokenizers[0]) as made:
        yield ModelGrammars(made, 0)


def settled(matcher: GrammarMatcher) -> GrammarMatcher:
    deadline = time.monotonic() + 30
    while matcher.pending:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return matcher


def allowed(matcher: GrammarMatcher) -> list[int]:
    mask = settled(matcher).bitmask()
    assert len(mask) == 4 * -(-SPEC.vocab // 32)
    return [t for t in range(SPEC.vocab) if mask[t // 8] >> t % 8 & 1]


def write(backend: ModelGrammars, grammar: Grammar, tokenizer: Any, pick: int = 0) -> str:
    """Follows the grammar, always with the ``pick``-th allowed token; without the end."""
    matcher = backend.compile(grammar).result(30)
    tokens: list[int] = []
    while not settled(matcher).is_terminated:
        choices = allowed(matcher)
        token = next((t for t in SPEC.eos_token_ids if t in choices), choices[pick % len(choices)])
        matcher.feed(token)
        assert settled(matcher).accepted
        if token not in SPEC.eos_token_ids:
            tokens.append(token)
    return str(tokenizer.decode(tokens))


@pytest.mark.parametrize("pick", [0, 1, 7])
def test_regex(backend: ModelGrammars, tokenizers: Any, pick: int) -> None:
    grammar = Grammar(kind="regex", source="(cat|dog)s? [0-9]{2}")
    assert re.fullmatch("(cat|dog)s? [0-9]{2}", write(backend, grammar, tokenizers[0], pick))


def test_ebnf(backend: ModelGrammars, tokenizers: Any) -> None:
    grammar = Grammar(kind="ebnf", source='root ::= "yes" | "no"')
    assert write(backend, grammar, tokenizers[0]) in ("yes", "no")


def test_a_token_that_is_not_allowed_is_refused(backend: ModelGrammars) -> None:
    matcher = backend.compile(Grammar(kind="regex", source="a")).result(30)
    other = next(t for t in range(SPEC.vocab) if t not in allowed(matcher))
    matcher.feed(other)
    assert not settled(matcher).accepted


@pytest.mark.parametrize("known", [False, True], ids=["new", "kept"])
def test_a_matcher_that_has_followed_an_output_goes_on_behind_it(
    backend: ModelGrammars, known: bool
) -> None:
    grammar = Grammar(kind="regex", source="[a-z]{3}[0-9]{4}(x|y)")
    if known:
        backend.compile(grammar).result(30)
    slow = backend.compile(Grammar(kind="regex", source="[a-z]{3}[0-9]{4}(?:x|y)")).result(30)
    tokens: list[int] = []
    while not settled(slow).is_terminated:
        after = backend.compile(grammar, tokens).result(30)
        assert not after.pending and after.error is None and after.accepted
        assert after.bitmask() == slow.bitmask()
        tokens.append(allowed(slow)[len(tokens) % len(allowed(slow))])
        slow.feed(tokens[-1])
    assert backend.compile(grammar, tokens).result(30).is_terminated
    wrong = next(t for t in range(SPEC.vocab) if t not in (tokens[0], *allowed(after)))
    assert not backend.compile(grammar, [wrong, *tokens]).result(30).accepted


class Endless:
    """A grammar whose every token takes a tenth of a second."""

    size = 1
    taken = 0
    is_terminated = False

    def build(self, grammar: Grammar) -> Endless:
        return self

    def walk(self) -> Endless:
        return self

    def accept(self, token: int) -> bool:
        self.taken += 1
        began = time.thread_time()
        while time.thread_time() - began < 0.1:
            pass
        return True


def test_a_long_output_that_takes_too_long_to_follow_is_given_up_on_the_way(
    tokenizers: Any,
) -> None:
    endless = Endless()
    kept = KeptGrammar(grammar=endless, first=NextMask(mask=b"", seconds=0.0), size=1)  # type: ignore[arg-type]
    with grammars(tokenizers[0]) as made:
        grammar = Grammar(kind="regex", source="a*")
        made.cache.put((0, grammar), kept)
        matcher = made.compile(0, grammar, [1] * 1000).result(30)
    assert matcher.error is not None and "grammar_mask_timeout" in matcher.error
    assert endless.taken < 10


def test_each_request_has_its_own_matcher(backend: ModelGrammars) -> None:
    grammar = Grammar(kind="regex", source="ab")
    first, second = (backend.compile(grammar).result(30) for _ in range(2))
    before = second.bitmask()
    first.feed(allowed(first)[0])
    assert settled(first).accepted
    assert second.bitmask() == before


def test_structural_tag_in_both_forms(backend: ModelGrammars) -> None:
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
def test_what_is_wrong_is_said(backend: ModelGrammars, kind: Any, source: str, words: str) -> None:
    error = backend.compile(Grammar(kind=kind, source=source)).exception(60)
    assert isinstance(error, ValueError)
    assert words in str(error) and ".cc" not in str(error)


def test_a_process_that_a_signal_has_stopped_is_killed(tokenizers: Any) -> None:
    changed = threading.Event()
    before = set(psutil.Process().children())
    with grammars(tokenizers[0], on_change=changed.set) as made:
        (process,) = set(psutil.Process().children()) - before
        process.suspend()
        assert changed.wait(30) and made.lost


def test_the_loop_is_woken(tokenizers: Any) -> None:
    woken = threading.Event()
    with grammars(tokenizers[0], on_change=woken.set) as made:
        matcher = made.compile(0, Grammar(kind="regex", source="x+")).result(30)
        assert woken.wait(30)
        woken.clear()
        matcher.feed(allowed(matcher)[0])
        assert woken.wait(30)
