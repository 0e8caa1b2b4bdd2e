"""What a plan says of a network between the pools, against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
from crosspool.cli.plan import inputs
from crosspool.config.errors import ConfigError
from crosspool.planner.devices.systems import EqualDevices
from crosspool.planner.network import HostNetwork, network_cost
from crosspool.planner.plan import make_plan
from crosspool.planner.request import PlanModel, PlanRequest
from crosspool.planner.shapes import catalogue
from crosspool.planner.traffic.lengths import Lengths, fixed
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import by_lengths

SHAPE = catalogue.load("Qwen3-30B-A3B")
"""48 layers of 2,048 features in 2 bytes: 4,096 bytes a row."""
NETWORK = HostNetwork(bytes_per_s=25e9 / 8, latency_s=50e-6)


def test_one_lane_waits_for_every_layer() -> None:
    """8 rows are 32 KiB, which 25 Gbit/s carries in 10.49 us; there and back with 50 us each way is
    120.97 us, and 48 layers add 5.807 ms."""
    found = network_cost(SHAPE, NETWORK, rows=8, ranks=1, lanes=1, tbt_s=20e-3)
    assert found.layer_bytes == 32768
    assert found.layer_s == pytest.approx(120.97e-6, rel=1e-4)
    assert found.serial_s == pytest.approx(5.8066e-3, rel=1e-4)
    assert found.added_s == pytest.approx(5.8066e-3, rel=1e-4)
    assert found.added_share == pytest.approx(0.29033, rel=1e-4)


def test_two_lanes_hide_half_of_the_time_between_tokens() -> None:
    """A layer takes 20 ms / 48 = 416.7 us, of which the other lane computes for 208.3 us; 4 rows
    of a lane take 110.5 us there and back. At 5 ms, 52.1 us hide and 58.4 us of each layer are
    added."""
    hidden = network_cost(SHAPE, NETWORK, rows=8, ranks=1, lanes=2, tbt_s=20e-3)
    assert hidden.layer_s == pytest.approx(110.486e-6, rel=1e-4)
    assert hidden.added_s == 0
    seen = network_cost(SHAPE, NETWORK, rows=8, ranks=1, lanes=2, tbt_s=5e-3)
    assert seen.added_s == pytest.approx(48 * (110.486e-6 - 52.083e-6), rel=1e-4)
    assert seen.added_share == pytest.approx(0.5607, rel=1e-3)
    alone = network_cost(SHAPE, NETWORK, rows=1, ranks=1, lanes=2, tbt_s=5e-3)
    assert alone.added_s == pytest.approx(alone.serial_s), "one row has one lane"


def test_every_rank_gets_all_rows_and_the_wire_bounds_a_layer() -> None:
    """64 rows to 4 ranks are 1 MiB: 8.389 ms each way at 1 Gbit/s, more than all compute, whatever
    lanes hide."""
    slow = HostNetwork(bytes_per_s=1e9 / 8, latency_s=0)
    found = network_cost(SHAPE, slow, rows=64, ranks=4, lanes=256, tbt_s=20e-3)
    assert found.layer_bytes == 1 << 20
    assert found.added_s == pytest.approx(48 * (1 << 20) * 8 / 1e9 - 20e-3, rel=1e-6)


def planned(network: HostNetwork | None, tbt_s: float = 20e-3) -> PlanRequest:
    lengths = Lengths(prompt=fixed(100), output=fixed(50))
    speed = DecodeSpeed(tbt_s=tbt_s)
    return PlanRequest(
        models=(PlanModel(name="a", shape=SHAPE), PlanModel(name="b", shape=SHAPE)),
        devices=EqualDevices(count=3, bytes=80 * 10**9),
        traffic=by_lengths(lengths, [7.5, 0.0], ["a", "b"], 100, 0, speed=speed),
        samples=1000,
        progress=False,
        network=network,
    )


def test_a_plan_says_what_suits_each_model_with_requests() -> None:
    """7.5 requests/s of one second each are 7.5 rows in the mean."""
    plan = make_plan(planned(NETWORK))
    (found,) = plan.network
    cost = found.planned
    assert (found.name, cost.rows, cost.layers) == ("a", math.ceil(7.5), 48)
    assert cost.ranks == len(plan.models[0].weight_devices)
    assert (found.suits, cost.added_s) == ("apart", 0)
    (far,) = make_plan(planned(HostNetwork(bytes_per_s=25e9 / 8, latency_s=1e-3))).network
    assert far.suits == "together"
    assert make_plan(planned(None)).network == ()


def test_networks_are_read() -> None:
    assert inputs.network("25Gbit,50us") == NETWORK
    assert inputs.network("100Mbit, 0.5ms") == HostNetwork(bytes_per_s=12.5e6, latency_s=0.5e-3)
    for text in ("25Gbit", "25GB,50us", "50us,25Gbit", "25Gbit,50", ""):
        with pytest.raises(ConfigError, match=r"--network .*such as 25Gbit,50us"):
            inputs.network(text)
    with pytest.raises(ConfigError, match="bytes_per_s 0: must be at least 1"):
        inputs.network("0Gbit,1us")
