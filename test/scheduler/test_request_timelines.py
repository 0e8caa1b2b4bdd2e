"""Timelines of requests that are traced, over the core and devices whose time a test tells."""

from __future__ import annotations

import dataclasses

from crosspool.scheduler.request import GenerateRequest
from simulation import Simulation, deployment, request, spec
from test_core_residency import simulation

PARENT = f"00-{1:032x}-{2:016x}-01"


def fixed(tokens: list[int]) -> int:
    return 7


def traced(asked: GenerateRequest) -> GenerateRequest:
    return dataclasses.replace(asked, traceparent=PARENT)


def step(sim: Simulation, seconds: float) -> None:
    """Lets the step in flight take so long."""
    sim.now += seconds
    sim.answer()


def phases(sim: Simulation, rid: str, since: float) -> list[tuple[str, float, float]]:
    """Name, beginning and end of each phase of a request that has ended."""
    *earlier, last = sim.outputs[rid]
    assert not any(output.timeline for output in earlier)
    assert last.timeline is not None and last.timeline.traceparent == PARENT
    return [(one.name, one.begin - since, one.end - since) for one in last.timeline.phases]


def test_phases_follow_each_other_from_arrival_to_end() -> None:
    sim = Simulation(deployment(1, max_running_requests=1), [spec()], fixed)
    start = sim.now
    sim.add(traced(request("first", 3, 3, stream=True)))
    sim.add(traced(request("second", 9, 1)))
    sim.add(request("not traced", 9, 1))
    for seconds in (0.25, 0.5, 1.0, 2.0):
        step(sim, seconds)
    sim.run()
    assert phases(sim, "first", start) == [
        ("queue", 0, 0),
        ("prefill", 0, 0.25),
        ("decode", 0.25, 1.75),
    ]
    assert phases(sim, "second", start) == [
        ("queue", 0, 1.75),
        ("prefill", 1.75, 3.75),
        ("decode", 3.75, 3.75),
    ]
    assert all(output.timeline is None for output in sim.outputs["not traced"])


def test_a_lost_rank_is_a_replay_until_the_next_token() -> None:
    sim = Simulation(deployment(1), [spec()], fixed)
    start = sim.now
    sim.add(traced(request("r", 3, 4)))
    step(sim, 0.25)
    sim.now += 0.5
    sim.lose()
    sim.now += 1.0
    sim.restore()
    step(sim, 0.5)
    sim.run()
    assert phases(sim, "r", start) == [
        ("queue", 0, 0),
        ("prefill", 0, 0.25),
        ("decode", 0.25, 0.75),
        ("replay", 0.75, 2.25),
        ("decode", 2.25, 2.25),
    ]


def test_a_request_of_an_earlier_scheduler_begins_with_a_replay() -> None:
    sim = Simulation(deployment(1), [spec()], fixed)
    start = sim.now
    sim.add(dataclasses.replace(traced(request("old", 3, 4)), delivered=(7,)))
    step(sim, 0.5)
    sim.run()
    assert phases(sim, "old", start) == [("replay", 0, 0.5), ("decode", 0.5, 0.5)]


def test_an_abort_ends_the_phase_that_it_finds() -> None:
    sim = Simulation(deployment(1), [spec()], fixed)
    start = sim.now
    sim.core.suspend(0)
    sim.add(traced(request("r", 3, 4)))
    sim.now += 2.0
    sim.core.abort("r")
    sim.schedule()
    assert phases(sim, "r", start) == [("queue", 0, 2)]


def test_a_wake_lies_within_the_queue() -> None:
    sim = simulation()
    start = sim.now
    sim.add(traced(request("a", 5, 2, model=1)))
    sim.now += 0.25
    sim.schedule()
    sim.follow()
    sim.now += 0.5
    sim.add(traced(request("later", 5, 2, model=1)))
    sim.run()
    found = phases(sim, "a", start)
    assert ("wake", 0, 0.25) in found and ("queue", 0, 0.25) in found
    assert not [one for one in phases(sim, "later", start) if one[0] == "wake"]


def test_a_model_that_gave_way_is_woken_within_decode() -> None:
    sim = simulation(next_token=fixed, loop="resident", lease_steps=50)
    start = sim.now
    sim.add(traced(request("first", 9, 60)))
    sim.answer()
    sim.add(request("second", 9, 60, model=1))
    sim.now += 10.0
    sim.schedule()
    sim.run()
    sim.follow()
    sim.run()
    sim.now += 1.0
    sim.follow()
    sim.run()
    found = phases(sim, "first", start)
    assert [(begin, end) for name, begin, end in found if name == "wake"] == [(10, 11)]
    assert ("decode", 0, 11) in found
