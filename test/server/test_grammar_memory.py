"""What many grammars leave behind in memory."""

from __future__ import annotations

import psutil
import pytest
from crosspool.config.deployment import Deployment
from crosspool.server.grammar_children import CompileLimits
from support.front_end import MODELS, deployment
from support.server import DEMO
from test_grammars_compiled import grammars
from test_hostile_grammars import regex
from transformers import AutoTokenizer

MARGIN = 32 << 20
"""Bytes beside the cache: what grammars take uncounted, and what the allocator keeps."""


def compiled_by(settings: Deployment, count: int) -> tuple[int, int, int]:
    """Compiles ``count`` different regexes; returns the bytes by which this process and the one
    that compiles have grown, and those in the cache."""
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO / MODELS[0]))
    limits = CompileLimits(
        seconds=settings.grammar_timeout,
        memory_bytes=settings.grammar_memory_bytes,
        mask_seconds=settings.grammar_mask_timeout,
    )
    with grammars(tokenizer, limits=limits, cache_bytes=settings.grammar_cache_bytes) as made:
        processes = [psutil.Process(), psutil.Process(made._process.pid)]
        made.compile(0, regex("first")).result(60)
        before = [process.memory_info().rss for process in processes]
        for number in range(count):
            made.settle(0)  # as the scheduler's loop does in every turn
            made.compile(number % 2, regex(f"[a-z]{{1,50}}{number}")).result(60)
        here, there = (
            process.memory_info().rss - size
            for process, size in zip(processes, before, strict=True)
        )
        assert made.cache.size <= settings.grammar_cache_bytes
        return here, there, made.cache.size


@pytest.mark.slow
def test_many_regexes_take_no_more_than_the_cache_may() -> None:
    settings = deployment(grammar_cache_bytes=4 << 20)
    here, there, cached = compiled_by(settings, 160)  # 45 MiB when all are kept
    print(f"{here >> 20} MiB here, {there >> 20} MiB there, {cached >> 20} MiB cached")
    assert here <= settings.grammar_cache_bytes + MARGIN
    assert there <= MARGIN
