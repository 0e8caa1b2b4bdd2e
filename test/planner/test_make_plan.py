"""Checks the parts of a plan against each other and against bytes counted by hand."""

import math

import msgspec
import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.compound import exact_demand
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.devices.systems import EqualDevices
from crosspool.planner.plan import make_plan
from crosspool.planner.request import PlanModel, PlanRequest
from crosspool.planner.result import Plan
from crosspool.planner.shapes import catalogue
from crosspool.planner.traffic.lengths import PUBLISHED
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import by_lengths

NAMES = ("Qwen3-30B-A3B", "GLM-4.7-Flash", "DeepSeek-V2-Lite")


def request(**changes: object) -> PlanRequest:
    speed = DecodeSpeed(tbt_s=0.06)
    traffic = by_lengths(
        PUBLISHED["azure-conversation"], [0.5, 0.5, 0.5], NAMES, 5000, 0, speed=speed
    )
    values: dict = {
        "models": tuple(PlanModel(name=name, shape=catalogue.load(name)) for name in NAMES),
        "devices": EqualDevices(count=5, bytes=40 * 10**9),
        "traffic": traffic,
        "samples": 20_000,
        "progress": False,
    }
    return PlanRequest(**(values | changes))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(request())


def test_the_papers_devices(plan: Plan) -> None:
    assert (plan.kv_devices, plan.weight_devices, plan.shared_device) == (1, 4, False)
    attention = sum(model.attention_bytes for model in plan.models)
    assert plan.kv_bytes == int(40e9 * (1 - 0.182)) - attention
    assert sum(plan.groups.device_bytes) == pytest.approx(
        sum(model.ffn_bytes for model in plan.models), abs=10
    )
    assert max(plan.groups.device_bytes) <= plan.devices.usable_for_weights
    assert {system.name: system.devices_needed for system in plan.systems}["crosspool"] == 5


def test_the_budget_is_the_quantile_of_the_law(plan: Plan) -> None:
    asked = request()
    kv_models = [
        KVModel(model.name, model.kv_bytes_per_token, 16, model.context) for model in plan.models
    ]
    law = exact_demand(asked.traffic, kv_models, chunk_bytes=2 << 20)
    exact = law.quantile(0.99).value
    demand = plan.budget.demand
    assert demand.low <= exact <= demand.high or abs(demand.value / exact - 1) < 0.02
    assert plan.budget.pool_bytes >= demand.value
    assert plan.exceeds == pytest.approx(law.exceeds(plan.kv_bytes), abs=1e-3)


def test_systems_are_told_apart(plan: Plan) -> None:
    static, mono, ours = plan.systems
    assert static.fits and mono.fits and ours.fits
    assert ours.sustained > 4 * max(static.sustained, mono.sustained)
    assert mono.sustained >= static.sustained
    glm = NAMES.index("GLM-4.7-Flash")
    assert ours.longest[glm] == catalogue.load("GLM-4.7-Flash").context
    assert 16384 < static.longest[glm] < 32768
    assert sorted(device for place in static.places for device in place) == [0, 1, 2, 3, 4]
    assert plan.saved.devices_over_static == (static.devices_needed or 0) - 5


def test_the_same_seed_gives_the_same_plan(plan: Plan) -> None:
    again = make_plan(request())
    assert msgspec.json.encode(again) == msgspec.json.encode(plan)
    other = make_plan(request(seed=1))
    assert other.budget.demand != plan.budget.demand


def test_json_holds_everything(plan: Plan) -> None:
    data = msgspec.json.decode(msgspec.json.encode(plan))
    assert set(data) == set(Plan.__struct_fields__)
    assert msgspec.convert(data, Plan).budget == plan.budget


def test_more_traffic_than_memory_is_a_note_not_an_error() -> None:
    rows = Samples(np.array([30000]), np.array([1000]), np.array([60.0]))
    traffic = Traffic(tuple(ModelTraffic(name, 0.5, rows) for name in NAMES), math.inf)
    plan = make_plan(request(traffic=traffic))
    assert plan.exceeds > 0.5
    assert plan.kv_devices_needed > plan.kv_devices
    ours = plan.systems[2]
    assert ours.sustained < plan.rate
    assert ours.devices_needed == 4 + plan.kv_devices_needed
    assert any("requests will wait" in note for note in plan.notes)


def test_one_device_has_both_pools() -> None:
    olmoe = (PlanModel(name="m", shape=catalogue.load("OLMoE-1B-7B")),)
    rows = Samples(np.array([100]), np.array([50]), np.array([5.0]))
    traffic = Traffic((ModelTraffic("m", 1.0, rows),), math.inf)
    devices = EqualDevices(count=1, bytes=24 * 10**9)
    plan = make_plan(request(models=olmoe, traffic=traffic, devices=devices))
    shape = olmoe[0].shape
    assert plan.shared_device and plan.weight_devices == 1
    assert plan.kv_bytes == devices.usable - shape.weight_bytes
    assert plan.systems[2].devices_needed == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"models": ()}, "models"),
        ({"quantile": 1.0}, "quantile"),
        ({"level": 0.0}, "level"),
        ({"samples": 0}, "samples"),
        ({"kv_pool_devices": 6}, "kv_pool_devices"),
        ({"kv_pool_devices": 2}, "devices 5"),
        ({"weight_pool_devices": 3}, "devices 5"),
        ({"devices": EqualDevices(count=4, bytes=40 * 10**9)}, "give at least 5"),
        ({"devices": EqualDevices(count=40, bytes=8 * 10**9)}, "no KV memory is left"),
        ({"devices": EqualDevices(count=1, bytes=40 * 10**9)}, "no KV memory is left"),
        ({"window": -1.0}, "window"),
        ({"peaks": True}, "peaks"),
    ],
)
def test_what_cannot_be_planned(changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_plan(request(**changes))


@pytest.mark.parametrize(
    ("context", "reserve", "told"),
    [
        (50_000, 0.182, "the model's own is 40960"),
        (1, 0.182, "at least 2"),
        (40_960, 0.75, "cannot fit"),
    ],
)
def test_contexts_that_cannot_be(context: int, reserve: float, told: str) -> None:
    asked = request()
    models = (with_context(asked.models[0], context), *asked.models[1:])
    devices = EqualDevices(count=5, bytes=40 * 10**9, reserve=reserve)
    with pytest.raises(ConfigError, match=told):
        make_plan(request(models=models, devices=devices))


def with_context(model: PlanModel, context: int) -> PlanModel:
    return PlanModel(name=model.name, shape=model.shape, context=context)
