"""What a plan says of a weight pool that holds fewer models than there are."""

from __future__ import annotations

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.devices.systems import EqualDevices
from crosspool.planner.plan import make_plan
from crosspool.planner.request import PlanModel, PlanRequest
from crosspool.planner.residency import WhatIsFound
from crosspool.planner.result import Plan
from crosspool.planner.shapes import catalogue
from crosspool.planner.traffic.lengths import PUBLISHED
from crosspool.planner.traffic.popularity import openrouter
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import by_lengths

SHAPE = catalogue.load("DeepSeek-V2-Lite")
NAMES = [f"model {number}" for number in range(8)]


def planned(pool: int | None, *, count: int = 2, **changes: object) -> Plan:
    speed = DecodeSpeed(tbt_s=0.01)
    rates = 0.1 * openrouter(len(NAMES))
    traffic = by_lengths(PUBLISHED["azure-conversation"], rates, NAMES, 2000, 0, speed=speed)
    values: dict = {
        "models": tuple(PlanModel(name=name, shape=SHAPE, context=4096) for name in NAMES),
        "devices": EqualDevices(count=count, bytes=400 * 10**9),
        "traffic": traffic,
        "samples": 2000,
        "progress": False,
        "weight_pool_bytes": pool,
        "wake_bytes_per_s": 10e9,
    }
    return make_plan(PlanRequest(**(values | changes)))


def found(plan: Plan) -> WhatIsFound:
    assert plan.residency is not None
    return plan.residency.found


def test_with_room_for_all_nothing_is_said() -> None:
    assert planned(None).residency is None
    assert planned(8 * SHAPE.ffn_bytes).residency is None


def test_more_room_finds_more_models_resident() -> None:
    plans = [planned(room * SHAPE.ffn_bytes) for room in (2, 4, 6)]
    shares = [found(plan).hit_share for plan in plans]
    assert shares == sorted(shares) and 0.5 < shares[0] < shares[2] - 0.1 and shares[2] < 1
    wakes = [found(plan).wakes_per_hour for plan in plans]
    assert wakes == sorted(wakes, reverse=True)


def test_figures_fit_together() -> None:
    plan = planned(3 * SHAPE.ffn_bytes)
    told = found(plan)
    assert 17_000 < told.requests < 19_000  # of 20,000, a tenth of which warms up
    assert told.requests / told.seconds == pytest.approx(0.1, rel=0.05)
    assert told.wait_s == pytest.approx((1 - told.hit_share) * told.missed_wait_s)
    rates = np.array([model.rate for model in plan.models]) / plan.rate
    shares = np.array([model.hit_share for model in told.models], dtype=float)
    assert float(rates @ shares) == pytest.approx(told.hit_share, abs=0.01)
    assert shares[0] > 0.95 and shares[0] > shares[7]
    wakes = sum(model.wakes_per_hour for model in told.models)
    assert wakes == pytest.approx(told.wakes_per_hour)
    # each wake is at most for the first of the requests that find the model asleep
    assert told.wakes_per_hour <= (1 - told.hit_share) * 0.1 * 3600
    seconds = (SHAPE.ffn_bytes + SHAPE.attention_bytes) / 10e9
    assert told.missed_wait_s > 0.8 * SHAPE.ffn_bytes / 10e9
    assert told.missed_wait_s < 20 * seconds


def test_faster_reading_shortens_the_wait_alone() -> None:
    slow, fast = (
        found(planned(4 * SHAPE.ffn_bytes, wake_bytes_per_s=rate)) for rate in (10e9, 40e9)
    )
    assert fast.missed_wait_s < 0.4 * slow.missed_wait_s
    assert fast.hit_share == pytest.approx(slow.hit_share, abs=0.05)


def test_the_pools_are_sized_for_what_is_resident() -> None:
    pool = 3 * SHAPE.ffn_bytes
    devices = EqualDevices(count=2, bytes=200 * 10**9)
    with pytest.raises(ConfigError, match="weight pool takes"):
        planned(None, devices=devices)  # all models need two devices for their FFN weights
    plan = planned(pool, devices=devices)
    assert (plan.kv_devices, plan.weight_devices) == (1, 1)
    assert plan.groups.device_bytes == (pool,)
    assert plan.groups.devices == ((0,),) * 8
    one = planned(pool, devices=EqualDevices(count=1, bytes=400 * 10**9))
    attention = 8 * SHAPE.attention_bytes
    assert one.kv_bytes == one.devices.usable - attention - pool


def test_a_trace_is_taken_as_it_is() -> None:
    """Two models are asked in turn, a minute apart, and one fits."""
    arrivals = np.arange(0.0, 3600.0, 60.0)
    samples = Samples(np.full(30, 100), np.full(30, 10), np.full(30, 1.0))
    traffic = Traffic(
        tuple(
            ModelTraffic(name, 30 / 3600, samples, arrivals[number::2])
            for number, name in enumerate(NAMES[:2])
        ),
        3600.0,
    )
    models = tuple(PlanModel(name=name, shape=SHAPE, context=4096) for name in NAMES[:2])
    plan = planned(SHAPE.ffn_bytes, count=1, models=models, traffic=traffic)
    told = found(plan)
    assert (told.requests, told.hit_share) == (60, pytest.approx(1 / 60))
    wake = (SHAPE.ffn_bytes + SHAPE.attention_bytes) / 10e9
    assert told.missed_wait_s == pytest.approx(wake)
    assert told.wakes_per_hour == pytest.approx(59 * 3600 / arrivals[-1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pool": SHAPE.ffn_bytes - 1}, "could never be resident"),
        ({"pool": SHAPE.ffn_bytes, "wake_bytes_per_s": 0.0}, "wake_bytes_per_s"),
        ({"pool": SHAPE.ffn_bytes, "residency_quantum": -1.0}, "residency_quantum"),
    ],
)
def test_impossible_pools_are_refused(changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        planned(**changes)
