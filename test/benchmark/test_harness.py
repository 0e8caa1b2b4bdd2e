"""Loads, summaries and records of the benchmarks, and the client's reading of a stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmark.client import Answer, _decode
from benchmark.records import Recorder, read_rows
from benchmark.summary import quantile, summarise
from benchmark.workload import Request, poisson, random_prompt


def test_quantiles_are_values_that_occurred() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert quantile(values, 0.5) == 3.0
    assert [quantile(range(1, 101), q) for q in (0.01, 0.99, 0.991, 1.0)] == [1, 99, 100, 100]
    assert quantile([1.0] * 98 + [9.0] * 2, 0.99) == 9.0


def test_summary_of_nothing() -> None:
    summary = summarise([])
    assert (summary.n, summary.median, summary.p99) == (0, None, None)


def test_poisson_arrivals() -> None:
    times = poisson(50.0, 400.0, np.random.default_rng(3))
    assert len(times) == pytest.approx(20_000, abs=4 * 20_000**0.5)
    assert times[0] >= 0.0 and times[-1] < 400.0
    gaps = np.diff(times)
    assert gaps.min() >= 0.0
    # exponential gaps: mean and standard deviation are alike
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.03)


def test_random_prompts_share_no_page() -> None:
    rng = np.random.default_rng(0)
    prompts = [random_prompt(64, 2048, rng) for _ in range(20)]
    assert {len(prompt) for prompt in prompts} == {64}
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 20
    assert all(300 <= token < 2048 for prompt in prompts for token in prompt)


def request(**changes: object) -> Request:
    fields = {"arrival": 1.0, "model": "m", "prompt": [400], "max_tokens": 3}
    return Request(**(fields | changes))  # type: ignore[arg-type]


def test_exact_lengths() -> None:
    whole = request()
    assert whole.output_tokens == 3 and whole.sampling()["ignore_eos"]
    early = request(max_tokens=9, stop_after=4, eos=2)
    assert early.output_tokens == 4
    sampling = early.sampling()
    assert sampling["max_new_tokens"] == 9 and sampling["min_new_tokens"] == 3
    assert set(sampling["logit_bias"]) == {"2"} and "ignore_eos" not in sampling
    assert request(max_tokens=9, stop_after=9).sampling()["ignore_eos"]


def event(tokens: list[int], finish: dict[str, object] | None = None) -> bytes:
    meta = {"cached_tokens": 16, "prompt_tokens": 40, "finish_reason": finish}
    return b"data: " + json.dumps({"output_ids": tokens, "meta_info": meta}).encode() + b"\n"


def test_a_stream_s_pieces() -> None:
    answer = Answer(request(), sent=1.0, status=200)
    end = event([7], {"type": "length"})
    _decode(answer, [(1.5, event([5])), (1.75, event([6])), (2.5, end), (2.5, b"data: [DONE]\n")])
    assert answer.complete and answer.tokens == [5, 6, 7]
    assert (answer.ttft, answer.tbt) == (0.5, [0.25, 0.75])
    assert (answer.cached_tokens, answer.prompt_tokens) == (16, 40)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([event([5]), event([6], {"type": "stop"})], "2 tokens of 3"),
        ([event([5, 6, 7])], "ended by None"),
        ([event([5, 6, 7], {"type": "abort", "message": "gone"})], "gone"),
        ([event([5]), b'data: {"error": {"message": "broken"}}\n'], "broken"),
    ],
)
def test_an_answer_that_is_not_whole_has_failed(events: list[bytes], why: str) -> None:
    answer = Answer(request(), sent=1.0, status=200)
    _decode(answer, [(2.0 + i, event) for i, event in enumerate(events)])
    assert not answer.complete and why in answer.error


def test_records(tmp_path: Path) -> None:
    recorder = Recorder("trial")
    recorder.add(
        "ttft", [3.0, 1.0, 2.0], "s", model="m", parameters={"load": 2.0},
        cpu_s=1.0, wall_s=2.0, load1=0.5, refused=4,
    )  # fmt: skip
    (row,) = read_rows(recorder.write(tmp_path))
    assert (row["median"], row["p99"], row["n"]) == (2.0, 3.0, 3)
    assert row["parameters"] == {"load": 2.0} and row["refused"] == 4
    assert row["machine"]["cores"] >= 1 and row["machine"]["cpu"]
    assert {"load1", "cpu_s", "wall_s", "date", "unit"} <= row.keys()
