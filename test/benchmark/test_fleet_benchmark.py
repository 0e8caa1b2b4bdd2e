"""What the benchmark of a fleet sends, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from benchmark.client import Answer
from benchmark.fleet import beside, cycles, planned, popularity, prefixes, registered
from benchmark.fleet.completions import Completion, Outcome, Sent, send
from benchmark.fleet.served import States, sizes
from benchmark.server import DEMO
from benchmark.usage import Usage
from benchmark.workload import Request

NAMES = ("a", "b", "c", "d")


def test_popular_models_get_the_requests_that_zipf_gives_them() -> None:
    assert popularity.zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    load = popularity.make_load(NAMES, 50.0, 60.0, 1.0, 0)
    counts = Counter(request.model for request in load)
    shares = [counts[name] / len(load) for name in NAMES]
    assert shares == pytest.approx(popularity.zipf(4, 1.0), abs=0.05)
    assert load == popularity.make_load(NAMES, 50.0, 60.0, 1.0, 0)
    assert [r.arrival for r in load] == sorted(r.arrival for r in load)


def outcome(name: str, arrival: float, first: float | None) -> Outcome:
    made = Outcome(Completion(arrival, name, "x", 2), 200 if first is not None else 503)
    made.times = [] if first is None else [first, first + 0.5]
    return made


def test_times_to_the_first_token_by_state_and_against_the_other_server() -> None:
    ours = [outcome("a", 0.0, 1.0), outcome("b", 1.0, 4.0), outcome("a", 2.0, None)]
    theirs = [outcome("a", 0.0, 5.0), outcome("b", 1.0, 12.0), outcome("a", 2.0, 2.5)]
    usage: Any = Usage.__new__(Usage)
    result = popularity.Result(
        Sent(ours, 0.0, 9.0), ["resident", "asleep", "resident"], 1, 1.0, usage
    )
    assert result.ratio is None
    assert (result.ttft("resident"), result.ttft("asleep")) == ([1.0], [3.0])
    result.theirs = Sent(theirs, 0.0, 9.0)
    assert result.ratio == pytest.approx((1 + 3) / (5 + 11))
    assert popularity.failures(ours) == {"503 ": 1}


def test_a_state_is_the_one_that_was_seen_last() -> None:
    states = States(None)  # type: ignore[arg-type]
    states.seen = [(1.0, {"a": "asleep"}), (2.0, {"a": "waking"}), (3.0, {"a": "resident"})]
    assert [states.at(when, "a") for when in (0.5, 1.5, 2.0, 9.0)] == [
        *("asleep", "asleep", "waking", "resident")
    ]


def test_a_pair_of_turns_gives_a_ratio() -> None:
    result = beside.Result()
    result.tbt = {"without": [[1.0, 2.0], [1.0, 1.0]], "beside": [[2.0, 3.0], [1.0, 4.0]]}
    assert result.ratio(0.99) == 1.5
    assert result.ratio(0.5) == 1.0


def test_what_is_left_of_cycles_is_told_by_process() -> None:
    def holding(descriptors: int, rss: int, files: int) -> cycles.Holding:
        http = cycles.Held(memory=rss, descriptors=descriptors, threads=7)
        return cycles.Holding(processes={"crosspool::http": http}, shared=3, files=files)

    result = cycles.Result(10, holding(9, 1000, 4), holding(9, 3000, 4), registered=2)
    assert result.bytes_per_cycle == 200 and not result.after.difference(result.before)
    result.with_registered = holding(30, 7000, 12)
    assert result.bytes_per_model == 2000
    assert result.with_registered.difference(result.after) == [
        "crosspool::http: 9 descriptors, now 30",
        "files: 4, now 12",
    ]
    result.load_seconds = result.unload_seconds = [0.5]
    assert "as before" in cycles.told(result)


def test_streams_of_completions_are_timed_and_broken_ones_are_told() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] == "gone":
            return web.Response(status=404, text="no such model")
        response = web.StreamResponse()
        await response.prepare(request)
        for text in ("", "x", "y"):
            event = {"choices": [{"text": text}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.05)
        if body["model"] != "broken":
            await response.write(b"data: [DONE]\n\n")
        return response

    async def run() -> list[Outcome]:
        application = web.Application()
        application.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        load = [Completion(0.0, name, "x", 2) for name in ("good", "broken", "gone")]
        try:
            return (await asyncio.to_thread(send, url, load, 10.0)).outcomes
        finally:
            await runner.cleanup()

    good, broken, gone = asyncio.run(run())
    assert good.complete and len(good.times) == 2 and good.tbt[0] > 0.02
    assert not broken.complete and broken.error == "the stream ended early"
    assert (gone.status, gone.error) == (404, "no such model")


def test_sizes_are_those_of_the_placement() -> None:
    ffn, attention = sizes(DEMO / "tiny-qwen3-moe")
    assert ffn > attention > 0


def answer(ttft: float, cached: int, tokens: list[int]) -> Answer:
    made = Answer(Request(0.0, "a", [1] * 100, 2), status=200, tokens=tokens)
    made.pieces, made.prompt_tokens, made.cached_tokens = [(ttft, 2)], 100, cached
    return made


def test_prefixes_are_compared_with_those_of_a_model_that_never_slept() -> None:
    result = prefixes.Result()
    result.answers = {
        "never slept": [answer(1.0, 64, [1, 2]), answer(2.0, 96, [3, 4])],
        "slept": [answer(1.5, 64, [1, 2]), answer(2.5, 96, [3, 5])],
        "cache lost": [answer(4.0, 0, [1, 2]), answer(5.0, 0, [3, 4])],
    }
    assert [result.hit_rate(case) for case in prefixes.CASES] == [0.8, 0.8, 0.0]
    assert [result.differing(case) for case in prefixes.CASES] == [0, 1, 0]
    assert result.ttft("slept") == [1.5, 2.5]
    assert "slept: 80.0% of prompt tokens cached" in prefixes.told(result)


def test_registered_models_are_counted_by_the_difference_of_two_servers() -> None:
    result = registered.Result(10)
    for case, seconds, memory in (("one model", 20.0, 1000), ("among others", 21.5, 21000)):
        held = cycles.Held(memory=memory, descriptors=9, threads=7)
        result.start_seconds[case] = seconds
        result.holdings[case] = cycles.Holding({"crosspool::http": held}, 3, 4)
    result.per_token = {"one model": [1.0, 2.0, 4.0], "among others": [1.1, 2.0, 5.0]}
    assert result.bytes_per_model == 2000
    assert result.seconds_per_model == pytest.approx(0.15)
    assert result.ratios == pytest.approx([1.1, 1.0, 1.25])
    assert "ratio in pairs 1.100" in registered.told(result)


def test_a_fleet_is_compared_with_its_plan() -> None:
    load = [Completion(float(second), NAMES[second // 4 % 2], "x", 2) for second in range(0, 40, 4)]
    learned = planned.Learned(wake_bytes_per_s=10.0, ttft=0.25, service=[1.0])
    figures = planned.simulated(
        load, NAMES[:2], 1, (10, 5), learned,
        after=8.0, quantum=10.0, rng=np.random.default_rng(0),
    )  # fmt: skip
    # each finds the other one resident, and waits for 15 bytes
    assert list(figures.values()) == pytest.approx([0.0, 8 * 3600 / 28, 1.75, 1.75])
    outcomes = [outcome("a", 0.0, 0.5), outcome("b", 1.0, 3.0), outcome("a", 2.0, None)]
    sent = Sent(outcomes, 0.0, 9.0)
    found = planned.measured(sent, ["resident", "asleep", "waking"], 2, 36.0)
    assert list(found.values()) == pytest.approx([1 / 3, 200.0, 1.25, 2.0])
    usage: Any = Usage.__new__(Usage)
    result = planned.Result(
        learned, {name: (1.0, 10.0) for name in figures}, figures, found, 3, {}, usage
    )
    assert [result.is_within(name) for name in figures] == [False, False, True, True]
