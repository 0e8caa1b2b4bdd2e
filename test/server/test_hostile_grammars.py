"""Grammars that take for ever, or all memory, and who waits for them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest
from crosspool.scheduler.request import Grammar
from crosspool.server.grammars import Grammars
from support.front_end import MODELS
from support.server import DEMO
from test_grammars_compiled import LIMITS, SPEC, allowed, grammars, settled
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(DEMO / MODELS[0]))


def left_recursive(rules: int, letter: str = "a") -> Grammar:
    """An EBNF that takes long to compile and to follow: each token takes about a tenth of a second
    with 300 rules, and 40 ms with 250."""
    chain = (
        f'r{i} ::= r{(i + 1) % rules} "{letter}" | r{(i + 7) % rules} | "b"' for i in range(rules)
    )
    return Grammar(kind="ebnf", source="\n".join(["root ::= r0", *chain]))


def endless(number: int = 0) -> Grammar:
    """One of several that take minutes to compile."""
    return left_recursive(3000, chr(ord("c") + number))


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


def children(made: Grammars) -> list[psutil.Process]:
    return psutil.Process(made._process.pid).children()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_grammar_that_takes_too_long_is_refused_and_its_process_ended(tokenizer: Any) -> None:
    limits = dataclasses.replace(LIMITS, seconds=0.6, memory_bytes=8 << 30)
    with grammars(tokenizer, limits=limits) as made:
        error = made.compile(0, endless()).exception(30)
        assert "0.6 s" in str(error) and "`grammar_timeout`" in str(error)
        assert not children(made)
        made.compile(0, regex("a")).result(30)


def compile_and(made: Grammars, act: Callable[[psutil.Process], None]) -> Any:
    """Compiles a grammar, does something to the child that compiles it, and returns the future."""
    for number in range(20):
        future = made.compile(0, left_recursive(60, chr(ord("c") + number)))
        while not future.done():
            for child in children(made):
                with suppress(psutil.NoSuchProcess):
                    act(child)
                    return future
    raise AssertionError("no child was seen at work")


def test_a_grammar_whose_process_gets_no_processor_is_not_refused(tokenizer: Any) -> None:
    def starve(child: psutil.Process) -> None:
        child.suspend()
        time.sleep(1.5)
        child.resume()

    limits = dataclasses.replace(LIMITS, seconds=0.6, memory_bytes=8 << 30)
    with grammars(tokenizer, limits=limits) as made:
        compile_and(made, starve).result(30)


def test_a_grammar_whose_process_is_killed_is_compiled_again(tokenizer: Any) -> None:
    with grammars(tokenizer, limits=dataclasses.replace(LIMITS, seconds=20)) as made:
        compile_and(made, psutil.Process.kill).result(30)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(
            kind="json_schema", source=json.dumps({"enum": [f"{i}{i}" for i in range(20_000)]})
        ),
        Grammar(kind="regex", source="|".join(f"{i}{i}" for i in range(20_000))),
    ],
)
def test_a_grammar_that_takes_too_much_memory_is_refused(tokenizer: Any, grammar: Grammar) -> None:
    limits = dataclasses.replace(LIMITS, seconds=20, memory_bytes=24 << 20)
    with grammars(tokenizer, limits=limits) as made:
        error = made.compile(0, grammar).exception(60)
        assert "24MiB" in str(error) and "`grammar_memory_bytes`" in str(error)
        made.compile(0, regex("a")).result(30)


def test_a_grammar_whose_first_mask_takes_for_ever_is_refused_and_its_process_ended(
    tokenizer: Any,
) -> None:
    source = (
        "root ::= a0\n"
        + "".join(f'a{i} ::= a{i + 1} "x" | a{i + 1} | ""\n' for i in range(3000))
        + 'a3000 ::= a0 | "q"\n'
    )
    with grammars(tokenizer, limits=dataclasses.replace(LIMITS, seconds=0.6)) as made:
        error = made.compile(0, Grammar(kind="ebnf", source=source)).exception(30)
        assert "`grammar_timeout`" in str(error)
        assert not children(made)


def test_nesting_is_bounded_before_it_is_compiled(tokenizer: Any) -> None:
    deep = '{"properties": {"a": ' * 900 + "{}" + "}}" * 900
    with grammars(tokenizer) as made:
        error = made.compile(0, Grammar(kind="json_schema", source=deep)).exception(30)
        assert "levels deep" in str(error)
        wrong = '{"type": 5, "description": "%s"}' % ("x" * 60_000)
        error = made.compile(0, Grammar(kind="json_schema", source=wrong)).exception(30)
        assert len(str(error)) <= 500
        lone = made.compile(0, regex("\ud800")).exception(30)
        assert "no Unicode text" in str(lone)


def test_an_ordinary_grammar_of_another_model_does_not_wait(tokenizer: Any) -> None:
    with grammars(tokenizer) as made:
        slow = [made.compile(0, endless(number)) for number in range(6)]
        made.compile(1, regex("(cat|dog)")).result(30)
        assert sum(future.done() for future in slow) < 3
        for future in slow:
            future.cancel()


def test_ordinary_grammars_of_the_same_model_wait_for_the_first_lane_only(tokenizer: Any) -> None:
    limits = dataclasses.replace(LIMITS, seconds=5, memory_bytes=8 << 30)
    with grammars(tokenizer, limits=limits) as made:
        slow = [made.compile(0, endless(number)) for number in range(3)]
        made.compile(0, regex("(cat|dog)")).result(30)
        assert not any(future.done() for future in slow)
        for future in slow:
            future.cancel()


def test_a_request_that_has_ended_takes_its_grammar_along(tokenizer: Any) -> None:
    limits = dataclasses.replace(LIMITS, seconds=60, memory_bytes=8 << 30)
    with grammars(tokenizer, limits=limits) as made:
        twice = [made.compile(0, endless()) for _ in range(2)]
        wait_until(lambda: children(made))
        twice[0].cancel()
        time.sleep(0.3)
        wait_until(lambda: children(made))  # the other request still waits
        twice[1].cancel()
        wait_until(lambda: not children(made))
        assert not made._waiting and not made._keys


def test_a_grammar_that_allows_nothing_is_refused(tokenizer: Any) -> None:
    circle = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
    schema = Grammar(kind="json_schema", source=json.dumps({"$defs": circle, "$ref": "#/$defs/a"}))
    with grammars(tokenizer) as made:
        assert "no token may follow" in str(made.compile(0, schema).exception(30))


def test_the_loss_of_the_process_is_told(tokenizer: Any) -> None:
    told = threading.Event()
    with grammars(tokenizer, on_change=told.set) as made:
        os.kill(made._process.pid, signal.SIGKILL)
        assert told.wait(30) and made.lost


AMBIGUOUS = Grammar(kind="ebnf", source='root ::= S\nS ::= S S S | S S | "a"')


def test_a_request_whose_masks_take_long_is_ended_and_delays_no_other(tokenizer: Any) -> None:
    with grammars(tokenizer, limits=dataclasses.replace(LIMITS, mask_seconds=0.02)) as made:
        slow = made.compile(0, AMBIGUOUS).result(30)
        quick = made.compile(0, regex("[a-z]+")).result(30)
        a = tokenizer.encode("a", add_special_tokens=False)[0]
        tokens = 0
        while settled(slow).error is None:
            slow.feed(a)
            tokens += 1
            assert tokens < 2000
            quick.feed(a)
            made.settle(30)
            assert not quick.pending and quick.accepted
        assert "`grammar_mask_timeout`" in slow.error


def test_a_grammar_whose_first_mask_takes_long_is_refused_before_it_is_compiled_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = dataclasses.replace(LIMITS, seconds=20)
    with grammars(tokenizer, limits=limits) as made:
        monkeypatch.setattr(made, "_build", lambda *_: pytest.fail("compiled"))
        error = made.compile(0, left_recursive(300)).exception(30)
        assert "`grammar_mask_timeout`" in str(error) and "the first one alone" in str(error)


def test_a_grammar_that_needs_more_than_the_first_lane_gives_does_not_begin_anew(
    tokenizer: Any,
) -> None:
    limits = dataclasses.replace(LIMITS, seconds=20)
    with grammars(tokenizer, limits=limits) as made:
        future = made.compile(0, endless())
        wait_until(lambda: children(made))
        (child,) = children(made)
        wait_until(lambda: child.cpu_times().user > 0.6)
        assert children(made) == [child]
        made.compile(0, regex("(cat|dog)")).result(30)  # the first lane is free again
        future.cancel()


def test_a_schema_of_hundreds_of_properties_is_ordinary(tokenizer: Any) -> None:
    kinds = [{"type": "string"}, {"type": "integer"}, {"enum": ["a", "b"]}, {"type": "number"}]
    members = {f"property_{i}": kinds[i % len(kinds)] for i in range(300)}
    schema = {"type": "object", "properties": members, "required": list(members)}
    with grammars(tokenizer, limits=dataclasses.replace(LIMITS, seconds=3)) as made:
        matcher = made.compile(0, Grammar(kind="json_schema", source=json.dumps(schema))).result(60)
        assert allowed(matcher)
        assert made.cache.size < 8 << 20


def test_a_request_whose_masks_take_long_all_together_is_ended(tokenizer: Any) -> None:
    with grammars(tokenizer, limits=dataclasses.replace(LIMITS, mask_seconds=2)) as made:
        slow = made.compile(0, left_recursive(250)).result(30)
        tokens = 0
        while settled(slow).error is None:
            slow.feed(next(t for t in allowed(slow) if t not in SPEC.eos_token_ids))
            tokens += 1
            assert tokens < 1000
        assert tokens > 1
        assert "`grammar_mask_timeout`" in slow.error


def test_the_cache_is_bounded_in_bytes_over_all_models(tokenizer: Any) -> None:
    limit = 4 << 20
    process = psutil.Process()
    with grammars(tokenizer, cache_bytes=limit) as made:
        made.compile(0, regex("[a-z]{1,2000}y")).result(30)
        before = process.memory_info().rss
        for number in range(30):
            made.settle(0)  # as the scheduler's loop does in every turn
            made.compile(number % 2, regex(f"[a-z]{{1,2000}}{number}")).result(60)
            assert made.cache.size <= limit
        assert len(made.cache) >= 2
        assert process.memory_info().rss - before < 24 << 20


def test_a_cached_grammar_is_not_compiled_again(tokenizer: Any) -> None:
    with grammars(tokenizer) as made:
        made.compile(0, regex("abc")).result(30)
        os.kill(made._process.pid, signal.SIGSTOP)
        matcher = made.compile(0, regex("abc")).result(30)
        assert len(allowed(matcher)) < SPEC.vocab
