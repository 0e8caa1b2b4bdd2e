"""The KV pool under real traffic: memory that follows demand from model to model, and overload."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.server import TINY_MODELS, Server

BUDGET = 16 << 20
PAGE = 16


@pytest.fixture(scope="module")
def small_pool() -> Iterator[Server]:
    """16 MiB of KV pool: a few long requests fill it."""
    flags = ["--kv-pool-bytes", str(BUDGET), "--context-length", "2048", "--dtype", "float32"]
    with Server([*flags, "--max-running-requests", "64", "--page-size", str(PAGE)]) as running:
        yield running


def pool(server: Server) -> dict[str, Any]:
    """The pool of the one attention rank."""
    (device,) = server.get("/crosspool/pools")
    return dict(device)


def wait_empty(server: Server) -> None:
    """Nothing is promised soon, and nothing is mapped once the cached prefixes are flushed."""
    deadline = time.monotonic() + 20
    while promised := server.get("/crosspool/status")["ranks"][0]["promised_bytes"]:
        assert time.monotonic() < deadline, f"{promised} bytes are still promised"
        time.sleep(0.1)
    assert server.manage("/flush_cache")[0] == 200
    now = pool(server)
    while now["free_bytes"] != now["budget_bytes"]:
        assert time.monotonic() < deadline, f"the pool is not empty: {now}"
        time.sleep(0.1)
        now = pool(server)


def request(tokens: int, prompt: int, number: int) -> dict[str, Any]:
    """A request that shares no prefix with those of another ``number``."""
    return {
        "input_ids": [7 + number, *(7 + i % 900 for i in range(prompt - 1))],
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
        },
    }


def fill(server: Server, model: str, share: float) -> tuple[int, int]:
    """Runs requests of ``model`` that need ``share`` of the budget at once; returns the most that
    was seen mapped for it and the device process's most resident bytes."""
    status = server.get("/crosspool/status")
    per_token = next(m["kv_bytes_per_token"] for m in status["models"] if m["name"] == model)
    length, new = 1024, 96
    count = max(1, round(share * BUDGET / (per_token * length)))
    most_mapped = most_resident = 0
    with ThreadPoolExecutor(count) as threads:
        # long prompts and few new tokens: the pages are reached quickly, and then held for a while
        answers = [
            threads.submit(server.post, f"/m/{model}/generate", request(new, length - new, number))
            for number in range(count)
        ]
        while not all(answer.done() for answer in answers):
            now = pool(server)
            most_mapped = max(most_mapped, now["mapped_bytes"][model])
            most_resident = max(most_resident, now["rss_bytes"])
            time.sleep(0.01)
        assert {answer.result()[0] for answer in answers} == {200}
    return most_mapped, most_resident


def test_memory_follows_demand_from_model_to_model(small_pool: Server) -> None:
    first, _, last = TINY_MODELS
    for model in (first, last):  # warm every lazily made buffer of the process
        fill(small_pool, model, 0.3)
        wait_empty(small_pool)
    mapped_first, resident_first = fill(small_pool, first, 0.8)
    wait_empty(small_pool)
    mapped_last, resident_last = fill(small_pool, last, 0.8)
    wait_empty(small_pool)
    # each had more than half: a static split of the pool between two models could not do it
    assert mapped_first > 0.7 * BUDGET
    assert mapped_last > 0.7 * BUDGET
    # the same physical memory: were it allocated anew, 0.8 of the budget would be added
    assert resident_last - resident_first < 0.4 * BUDGET


def test_overload_answers_every_request_in_full_or_refuses_it(small_pool: Server) -> None:
    status = small_pool.get("/crosspool/status")
    tokens, prompt = 32, 700
    jobs: list[tuple[str, dict[str, Any]]] = []
    for model in TINY_MODELS:
        per_token = next(m["kv_bytes_per_token"] for m in status["models"] if m["name"] == model)
        count = BUDGET // (per_token * (tokens + prompt)) + 1  # each model alone fills the pool
        jobs += [(model, request(tokens, prompt, number)) for number in range(count)]
    with ThreadPoolExecutor(len(jobs)) as threads:
        answers = list(
            threads.map(lambda job: small_pool.post(f"/m/{job[0]}/generate", job[1]), jobs)
        )
    full = 0
    for code, answer in answers:
        assert code in (200, 429), answer
        if code == 200:
            assert len(answer["output_ids"]) == tokens
            full += 1
        else:
            assert "retry" in str(answer).lower()
    assert full >= len(jobs) // 3
    wait_empty(small_pool)
