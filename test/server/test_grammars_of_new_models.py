"""Grammars of models that come to a running server and go from it."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_library import GrammarCompiler, LaterCompiler
from crosspool.server.grammar_xgrammar import XGrammarCompiler
from crosspool.server.grammars import Grammars, ModelGrammars
from support.front_end import MODELS
from support.server import DEMO
from test_grammars_compiled import LIMITS, SPEC, write
from test_hostile_grammars import regex
from transformers import AutoTokenizer

CONFIG = ModelConfig(name="new", path=str(DEMO / MODELS[0]))
SLOW = Grammar(kind="regex", source="((a{1,200}b{1,200}){1,200}){1,200}")
"""Takes all the time that a grammar may take."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CONFIG.path)


def compiler(tokenizer: Any) -> GrammarCompiler:
    return XGrammarCompiler(tokenizer, SPEC, any_whitespace=True)


@contextlib.contextmanager
def empty(changes: list[int] | None = None) -> Iterator[Grammars]:
    """Grammars of a server without any model; ``changes`` grows whenever something has changed."""

    def make(number: int, config: ModelConfig) -> GrammarCompiler:
        if config.name == "broken":
            raise ValueError("there is no tokenizer in it")
        return compiler(AutoTokenizer.from_pretrained(config.path))

    noted = [] if changes is None else changes
    made = Grammars({}, make, LIMITS, cache_bytes=64 << 20, on_change=lambda: noted.append(1))
    try:
        yield made
    finally:
        made.close()


def test_a_model_that_comes_has_its_grammars_compiled(tokenizer: Any) -> None:
    changes: list[int] = []
    with empty(changes) as made:
        made.add(7, CONFIG, compiler(tokenizer)).result(30)
        assert changes
        grammar = Grammar(kind="ebnf", source='root ::= "yes" | "no"')
        assert write(ModelGrammars(made, 7), grammar, tokenizer) in ("yes", "no")


def test_what_compiles_is_made_with_the_first_grammar_and_once(tokenizer: Any) -> None:
    made_at = list[int]()

    def make() -> GrammarCompiler:
        made_at.append(threading.get_ident())
        return compiler(tokenizer)

    with empty() as made:
        made.add(7, CONFIG, LaterCompiler(make)).result(30)
        assert not made_at
        wanted = [made.compile(7, regex(f"[a-{end}]{{3}}")) for end in "xyz"]
        for one in wanted:
            one.result(30)
        assert len(made_at) == 1 and made_at != [threading.get_ident()]


def test_a_model_whose_tokenizer_the_process_cannot_read_is_refused(tokenizer: Any) -> None:
    with empty() as made:
        refused = made.add(3, ModelConfig(name="broken", path="/nowhere"), compiler(tokenizer))
        with pytest.raises(ValueError, match="there is no tokenizer in it"):
            refused.result(30)
        made.remove(3)
        made.add(4, CONFIG, compiler(tokenizer)).result(30)  # the process goes on
        made.compile(4, regex("[a-z]{3}")).result(30)
        assert not made.lost


def test_a_model_that_goes_takes_its_grammars_along(tokenizer: Any) -> None:
    with empty() as made:
        for number in (0, 1):
            made.add(number, CONFIG, compiler(tokenizer)).result(30)
            made.compile(number, regex("[a-z]{3}")).result(30)
        assert len(made.cache) == 2
        waiting = made.compile(0, SLOW)
        made.remove(0)
        assert len(made.cache) == 1 and made.cache.size > 0
        with pytest.raises(ValueError, match="not served any more"):
            waiting.result(5)
        made.compile(1, regex("[0-9]{4}")).result(30)
        made.remove(1)
        assert (len(made.cache), made.cache.size) == (0, 0)


@pytest.mark.slow
def test_models_that_come_and_go_leave_nothing_behind(tokenizer: Any) -> None:
    with empty() as made:
        processes = [psutil.Process(), psutil.Process(made._process.pid)]

        def cycle(number: int) -> None:
            made.add(number, CONFIG, compiler(tokenizer)).result(30)
            made.compile(number, regex("[a-z]{3}")).result(30)
            made.remove(number)

        for number in range(10):
            cycle(number)
        gc.collect()  # what earlier tests left to it in this process
        before = [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes]
        for number in range(10, 60):
            cycle(number)
        for process, (size, descriptors, threads) in zip(processes, before, strict=True):
            assert process.num_fds() <= descriptors
            assert process.num_threads() <= threads
            assert process.memory_info().rss - size < 16 << 20
