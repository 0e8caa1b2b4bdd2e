"""What requests take, as the scheduler's histograms have it."""

from __future__ import annotations

import dataclasses

import pytest
from crosspool.observability.histograms import ModelHistograms
from simulation import Simulation, deployment, request, spec


def fixed(tokens: list[int]) -> int:
    return 7


def step(sim: Simulation, seconds: float) -> None:
    """Lets the step in flight take so long."""
    sim.now += seconds
    sim.answer()


def of(sim: Simulation, model: int = 0) -> ModelHistograms:
    return sim.core.histograms()[model]


@pytest.mark.parametrize("stream", [False, True])
def test_every_time_of_a_request_is_counted_once(stream: bool) -> None:
    sim = Simulation(deployment(2, max_running_requests=1), [spec(), spec()], fixed)
    sim.add(request("first", 3, 3, stream=stream))
    sim.add(request("second", 9, 1))
    for seconds in (0.25, 0.5, 1.0, 2.0):
        step(sim, seconds)
    sim.run()
    found = of(sim)
    assert (found.model, found.name) == (0, "model0")
    assert (found.queue_seconds.count, found.queue_seconds.sum) == (2, 0.25 + 0.5 + 1.0)
    assert found.first_token_seconds.sum == 0.25 + (0.25 + 0.5 + 1.0 + 2.0)
    between = found.between_tokens_seconds
    assert (between.count, between.sum, between.quantile(1.0)) == (2, 1.5, 1.0)
    assert (found.end_to_end_seconds.count, found.end_to_end_seconds.sum) == (2, 1.75 + 3.75)
    assert (found.prompt_tokens.count, found.prompt_tokens.sum) == (2, 12)
    assert (found.output_tokens.count, found.output_tokens.sum) == (2, 4)
    other = of(sim, 1)
    assert other.queue_seconds.count == other.first_token_seconds.count == 0


def test_an_aborted_request_has_no_end() -> None:
    sim = Simulation(deployment(1), [spec()], fixed)
    sim.add(request("r", 3, 50))
    step(sim, 0.25)
    sim.core.abort("r")
    sim.run()
    found = of(sim)
    assert found.first_token_seconds.count == 1
    assert found.end_to_end_seconds.count == found.output_tokens.count == 0


def test_a_lost_rank_is_a_long_time_between_tokens_and_no_second_first_one() -> None:
    sim = Simulation(deployment(1), [spec()], fixed)
    sim.add(request("r", 3, 4))
    step(sim, 0.25)
    sim.lose()
    sim.now += 1.0
    sim.restore()
    step(sim, 0.5)
    found = of(sim)
    assert (found.first_token_seconds.count, found.queue_seconds.count) == (1, 1)
    assert (found.between_tokens_seconds.count, found.between_tokens_seconds.sum) == (1, 1.5)


def test_health_checks_and_requests_of_an_earlier_scheduler_are_left_out() -> None:
    sim = Simulation(deployment(1), [spec()], fixed)
    sim.add(dataclasses.replace(request("probe", 3, 2), is_probe=True))
    sim.add(dataclasses.replace(request("old", 3, 4), delivered=(7,)))
    sim.run()
    found = of(sim)
    counts = [h.count for h in (found.queue_seconds, found.first_token_seconds)]
    assert counts == [0, 0] and found.end_to_end_seconds.count == 0


def test_lanes_are_busy_while_steps_are_in_flight() -> None:
    sim = Simulation(deployment(2, lanes=2), [spec(), spec()], fixed)
    sim.add(request("a", 3, 2), request("b", 3, 2, model=1))
    before = sim.core.snapshot().ranks[0]
    assert (before.lanes, before.busy_seconds, before.steps_in_flight) == (2, 0.0, 2)
    step(sim, 0.5)
    sim.run()
    rank = sim.core.snapshot().ranks[0]
    assert rank.steps_in_flight == 0 and rank.busy_seconds >= 0.5
