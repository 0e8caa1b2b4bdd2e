"""Loads of the served benchmarks, and what is computed from their outcomes."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import pytest

from benchmark import contended, contended_report, prefix_cache
from benchmark.client import Answer, Replay
from benchmark.pool_sampler import PoolSampler
from benchmark.server import TINY_MODELS
from benchmark.usage import Usage, total
from benchmark.workload import Request


def test_contended_load_offers_its_rate_and_lengths() -> None:
    plan = contended.Plan(seconds=100.0, loop="host")
    load = contended.make_load(plan, 20.0, (1, 50))
    assert len(load) == pytest.approx(2000, rel=0.1)
    assert {r.model for r in load} == set(TINY_MODELS)
    assert all(384 <= len(r.prompt) <= 768 and 64 <= r.output_tokens <= 256 for r in load)
    assert all(r.output_tokens < r.max_tokens for r in load)
    again = contended.make_load(plan, 20.0, (1, 50))
    assert [(r.arrival, r.prompt) for r in load] == [(r.arrival, r.prompt) for r in again]
    assert load != contended.make_load(plan, 20.0, (2, 50))


def test_promised_bytes_are_whole_pages() -> None:
    request = Request(0.0, "m", prompt=[400] * 300, max_tokens=384)
    # 684 tokens take 43 pages of 16
    assert contended.promised_bytes(request, {"m": 100}) == 43 * 16 * 100


def test_ratio_compares_the_highest_load_with_the_lowest() -> None:
    def phase(promise: str, load: float, turn: int, *gaps: float) -> contended_report.Phase:
        times = np.cumsum([1.0, *gaps])
        request = Request(0.0, "a", [400], len(times))
        answer = Answer(request, status=200, pieces=[(float(t), 1) for t in times])
        refused = Answer(request, status=429, pieces=[(0.0, 1), (99.0, 1)])
        replay = Replay([answer, refused], 1.0, 0.0, 0.1)
        usage = Usage(cast(Any, None))
        return contended_report.Phase(promise, load, turn, replay, PoolSampler(0), usage, 0)

    phases = [
        phase("growth", 0.5, 0, 0.01, 0.04),
        phase("growth", 1.0, 0, 9.0),
        phase("growth", 2.0, 0, 0.06, 0.01),
        phase("growth", 2.0, 1, 0.05, 0.05),
        phase("growth", 0.5, 1, 0.05),
        phase("worst_case", 2.0, 0, 9.0),
    ]
    both = contended_report.ratio(phases, "growth")
    assert both.by_round == pytest.approx([1.5, 1.0])
    assert both.pooled == pytest.approx(0.06 / 0.05)


def test_reusable_share_by_hand() -> None:
    size = prefix_cache.PAGE_SIZE
    head = list(range(300, 300 + 4 * size))

    def request(model: str, prompt: list[int]) -> Request:
        return Request(0.0, model, prompt, 1)

    # the second prompt shares four whole pages; the third is another model's; the fourth is the
    # head alone, of which the last token must be computed
    load = [
        request("a", [*head, 1, 2]),
        request("a", [*head, 3, 4]),
        request("b", head),
        request("a", head),
    ]
    total = 2 * (4 * size + 2) + 2 * 4 * size
    assert prefix_cache.reusable_share(load) == pytest.approx((4 * size + 3 * size) / total)


def test_answers_are_compared_request_by_request() -> None:
    def round_(cache: str, *tokens: list[int]) -> prefix_cache.Round:
        request = Request(0.0, "a", [400], 2)
        answers = [Answer(request, status=200, tokens=t) for t in tokens]
        return prefix_cache.Round(cache, Replay(answers, 1.0, 0.0, 0.1), Usage(cast(Any, None)))

    rounds = [
        round_("with", [1, 2], [3, 4]),
        round_("without", [1, 2], [3, 5]),
        round_("without", [7, 8]),
        round_("with", [7, 8]),
    ]
    assert [(a.tokens, b.tokens) for a, b in prefix_cache.different(rounds)] == [([3, 4], [3, 5])]


def test_prefix_prompts_share_the_system_prompt_only() -> None:
    prompts = prefix_cache.Prompts(TINY_MODELS[0], 0)
    rng = np.random.default_rng(1)
    first, second = prompts.draw(rng), prompts.draw(rng)
    assert len(prompts.system) == prefix_cache.SYSTEM_TOKENS
    assert first[: len(prompts.system)] == second[: len(prompts.system)] == prompts.system
    assert first != second


def test_usages_add_up() -> None:
    server = cast(Any, None)
    first = Usage(server, load1=0.5, wall_s=10.0, server_cpu_s=9.0, own_cpu_s=1.0, other_cpu_s=0.5)
    second = Usage(server, load1=1.5, wall_s=30.0, server_cpu_s=8.0, own_cpu_s=2.0, other_cpu_s=3.5)
    assert total([first, second]) == {
        "cpu_s": 20.0, "wall_s": 40.0, "load1": 1.5, "other_cpu_share": 0.1
    }  # fmt: skip


def test_usage_tells_this_process_from_others() -> None:
    class Nothing:
        def cpu_seconds(self) -> dict[str, float]:
            return {}

    with Usage(cast(Any, Nothing())) as usage:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
    assert usage.own_cpu_s == pytest.approx(0.3, abs=0.1) and usage.wall_s >= 0.3
    assert usage.server_cpu_s == 0.0
