"""The pure parts of the served plan: the plan's input, and the comparison with the run."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.quantile import QuantileEstimate
from crosspool.planner.traffic.service_time import DecodeSpeed

from benchmark import served_plan
from benchmark.client import Answer
from benchmark.server import TINY_MODELS
from benchmark.workload import Request

SPEED = DecodeSpeed(tbt_s=0.01, prefill_tokens_per_s=5000.0, ttft_s=0.02)


def served(model: str, arrival: float, prompt: int, output: int) -> Answer:
    """Makes an answer that comes exactly at SPEED."""
    request = Request(arrival, model, [400] * prompt, output)
    first = arrival + SPEED.ttft_s + prompt / SPEED.prefill_tokens_per_s
    pieces = [(first + SPEED.tbt_s * i, 1) for i in range(output)]
    return Answer(
        request, sent=arrival, status=200, tokens=[7] * output, pieces=pieces, done=pieces[-1][0]
    )


def answers() -> list[Answer]:
    rng = np.random.default_rng(5)
    return [
        served(TINY_MODELS[i % 3], 0.3 * i, int(rng.integers(50, 900)), int(rng.integers(2, 80)))
        for i in range(60)
    ]


def test_the_speed_of_answers_is_found_again() -> None:
    speed = served_plan.fitted_speed(answers())
    assert speed.tbt_s == pytest.approx(SPEED.tbt_s)
    assert speed.prefill_tokens_per_s == pytest.approx(SPEED.prefill_tokens_per_s)
    assert speed.ttft_s == pytest.approx(SPEED.ttft_s)


def test_a_speed_has_no_negative_constant() -> None:
    """TTFT grows faster than the prompt, so that the best line would begin below zero."""
    steep = [served(TINY_MODELS[0], float(i), 100 * i, 5) for i in range(1, 9)]
    for answer in steep:
        late = (len(answer.request.prompt) / 400) ** 2
        answer.pieces = [(when + late, tokens) for when, tokens in answer.pieces]
    speed = served_plan.fitted_speed(steep)
    assert speed.ttft_s == 0.0
    modelled = [len(a.request.prompt) / speed.prefill_tokens_per_s for a in steep]
    # least squares through the origin: what is left over is orthogonal to the prompts
    left = np.array([a.ttft for a in steep]) - modelled
    prompts = np.array([len(a.request.prompt) for a in steep])
    assert left @ prompts == pytest.approx(0.0, abs=1e-6)


def test_requests_are_the_trace_s() -> None:
    trace = served_plan.make_trace(60.0, seed=4)
    load = served_plan.requests_of(trace, seed=5)
    assert len(load) == pytest.approx(60 * sum(served_plan.RATES), rel=0.5)
    assert [len(r.prompt) for r in load] == trace.prompt.tolist()
    assert [r.output_tokens for r in load] == trace.output.tolist()
    assert all(len(r.prompt) + r.max_tokens < served_plan.CONTEXT for r in load)


def test_measured_and_modelled_times_agree_where_the_model_is_right() -> None:
    done = answers()
    as_served = served_plan.traffic_of(done, None)
    modelled = served_plan.traffic_of(done, SPEED)
    assert [m.model for m in as_served.models] == list(TINY_MODELS)
    for measured, planned in zip(as_served.models, modelled.models, strict=True):
        # the model counts a token's time for the first token, too
        difference = planned.samples.service - measured.samples.service
        assert difference == pytest.approx(SPEED.tbt_s)


def test_a_run_is_compared_with_the_interval_of_one_run() -> None:
    models = [KVModel(name, 4096, served_plan.PAGE_SIZE, 4096) for name in TINY_MODELS]
    setting = served_plan.Setting(seconds=20.0, simulated_runs=50, samples=2000)
    planned = served_plan.plan(SPEED, models, setting)
    for charge, one in planned.items():
        assert one.of_one_run.low < one.of_one_run.high
        assert one.at_random_time.value > 0, charge

    class Samples:
        def column(self, name: str) -> np.ndarray:
            active = name == "mapped_bytes"
            return np.array([planned["active"].of_one_run.value if active else 1e12] * 10)

    compared = served_plan.compare(planned, answers(), cast(Any, Samples()), SPEED, models)
    assert [c.charge for c in compared] == ["active", "promised"]
    assert [c.within for c in compared] == [True, False]
    # the same arrivals, and times that differ by a token's: the two replays nearly agree
    for c in compared:
        assert c.replayed_as_served == pytest.approx(c.replayed, rel=0.3)


def test_within_has_both_ends() -> None:
    interval = QuantileEstimate(0.99, 20.0, 10.0, 30.0, 0.95)
    planned = served_plan.Planned(interval, interval)
    for value, expected in ((9.0, False), (10.0, True), (30.0, True), (31.0, False)):
        compared = served_plan.Compared("active", planned, 0.0, 0.0, [value])
        assert compared.within is expected
