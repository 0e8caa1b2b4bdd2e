"""The simulator against closed forms, and against what no simulation may do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.models.spec import DenseFFN, GQASpec, ModelSpec, RopeSpec
from crosspool.simulator.costs import CostTable, HostCosts, ShapeCosts
from crosspool.simulator.events import Simulated, simulate
from crosspool.simulator.requests import DeviceLoss, SimulatedRequest
from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes

LAYERS = 4
SPEC = ModelSpec(
    family="qwen3_moe",
    hidden=16,
    vocab=320,
    context=4096,
    dtype="bfloat16",
    norm_eps=1e-6,
    tied_embeddings=False,
    attention=GQASpec(
        q_heads=1, kv_heads=1, head_dim=64, scale=1.0, rope=RopeSpec(dim=64, interleaved=False)
    ),
    ffn=(DenseFFN(intermediate=8),) * LAYERS,
    eos_token_ids=(300,),
)
OWN = ffn_bytes(SPEC, FFNShard(rank=0, ranks=1, parallel="tp"))
TURN, ARRIVAL, FIRST, END = 0.001, 0.002, 0.003, 0.004
HOST = HostCosts(arrival=ARRIVAL, turn=TURN, first_token=FIRST, end=END)


def deployment(models: int = 1, **fields: Any) -> Deployment:
    defaults: dict[str, Any] = {
        "kv_pool_devices": (Device("cuda:0"),),
        "weight_pool_devices": (Device("cuda:1"),),
        "kv_pool_bytes": 64 << 20,
        "weight_pool_bytes": 1 << 30,
        "chunk_bytes": 1 << 16,
        "prefix_cache": False,
    }
    return Deployment(
        models={n: ModelConfig(name=f"model{n}", path="/none") for n in range(models)},
        next_model=models,
        **(defaults | fields),
    )


def costs(host: HostCosts | None = None, **fields: Any) -> CostTable:
    """Steps take 10 ms for attention, 20 ms for FFN and 2 ms for the head, whatever they have."""
    shape: dict[str, Any] = {
        "layers": LAYERS,
        "attention": [(1.0, 0.01), (4096.0, 0.01)],
        "decode_read": 0.0,
        "chunk_read": 0.0,
        "ffn": [(1.0, 0.02), (4096.0, 0.02)],
        "head": [(1.0, 0.002), (4096.0, 0.002)],
    }
    return CostTable(
        source="the test",
        models={"*": ShapeCosts(**(shape | fields))},
        wake_bytes_per_s=OWN / 0.5,
        host=host or HostCosts(),
    )


def run(
    d: Deployment, table: CostTable, requests: list[SimulatedRequest], **more: Any
) -> Simulated:
    return simulate(d, dict.fromkeys(d.models, SPEC), table, requests, **more)


def drawn(number: int, models: int, rate: float, seed: int = 0) -> list[SimulatedRequest]:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, number)).tolist()
    return [
        SimulatedRequest(
            time,
            int(rng.integers(models)),
            int(rng.integers(1, 900)),
            int(rng.integers(1, 60)),
            prefix=int(rng.integers(0, 200)),
        )
        for time in times
    ]


STEP = 0.032


@pytest.mark.parametrize("lease", [1, 7, 32])
def test_one_request_takes_what_its_steps_take(lease: int) -> None:
    """Its prompt has two chunks, of which the first yields no token and needs no head."""
    table = costs(HOST, crossing=0.0005)
    (found,) = run(
        deployment(lease_steps=lease), table, [SimulatedRequest(1.0, 0, 700, 11)]
    ).outcomes
    step = STEP + LAYERS * 0.0005
    first = 1 + ARRIVAL + (TURN + step - 0.002) + (TURN + step) + FIRST
    assert found.first == pytest.approx(first)
    messages = math.ceil(11 / lease) - 1  # the last chunk's lease goes on with decode steps
    assert found.last == pytest.approx(first + 10 * step + messages * TURN)
    assert found.end == pytest.approx(found.last + END)
    assert (found.status, found.tokens) == (200, 11)


def test_kv_that_is_read_costs_by_its_length() -> None:
    table = costs(decode_read=1e-5, chunk_read=1e-6)
    (found,) = run(deployment(), table, [SimulatedRequest(0.0, 0, 100, 4)]).outcomes
    first = STEP + 1e-6 * 100 * 50
    assert found.first == pytest.approx(first)
    assert found.last == pytest.approx(first + 3 * STEP + 1e-5 * (100 + 101 + 102), rel=1e-6)


def test_a_queue_of_one_server_waits_as_pollaczek_and_khinchine_say() -> None:
    """M/D/1: Poisson arrivals, one request at a time, each of one step. The mean wait is
    rho / (2 (1 - rho)) services."""
    rho, number = 0.6, 3000
    times = np.cumsum(np.random.default_rng(5).exponential(STEP / rho, number)).tolist()
    requests = [SimulatedRequest(time, 0, 16, 1) for time in times]
    d = deployment(
        max_running_requests=1, lanes=1, max_queued_requests=number, kv_pool_bytes=4 << 20
    )
    outcomes = run(d, costs(), requests).outcomes
    waits = [o.end - r.arrival - STEP for o, r in zip(outcomes, requests, strict=True)]
    assert min(waits) > -1e-9
    assert np.mean(waits) == pytest.approx(STEP * rho / (2 * (1 - rho)), rel=0.05)
    # Lindley's recursion has each wait exactly
    wait, expected = 0.0, [0.0]
    for gap in np.diff(times):
        wait = max(0.0, wait + STEP - gap)
        expected.append(wait)
    assert waits == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("promise", ["worst_case", "growth"])
@pytest.mark.parametrize("models", [1, 5])
def test_no_request_is_lost_and_none_is_early(models: int, promise: str) -> None:
    requests = drawn(150, models, 3.0)
    d = deployment(models, promise=promise, kv_pool_bytes=3 << 20, prefix_cache=True)
    table = costs(HOST, decode_read=1e-7)
    found = run(d, table, requests)
    for request, outcome in zip(requests, found.outcomes, strict=True):
        assert (outcome.status, outcome.tokens) == (200, request.output)
        assert request.arrival + ARRIVAL + TURN + FIRST + 0.03 < outcome.first
        assert outcome.first <= outcome.last <= outcome.end - END + 1e-9
    gaps = sum(sum(each.times) for each in found.gaps.values())
    assert gaps == sum(request.output - 1 for request in requests)
    assert all(0 < busy <= found.seconds for busy in found.busy)
    again = run(d, table, requests)
    assert again.outcomes == found.outcomes


def test_leases_change_no_time_where_messages_take_none() -> None:
    requests = drawn(60, 1, 1.0)
    singly = run(deployment(lease_steps=1), costs(), requests)
    leased = run(deployment(lease_steps=1000), costs(), requests)
    assert leased.turns < singly.turns / 3
    for one, other in zip(singly.outcomes, leased.outcomes, strict=True):
        assert (one.first, one.end) == pytest.approx((other.first, other.end), abs=1e-6)


def test_two_pools_overlap_and_one_device_does_not() -> None:
    """Two models decode at once: a cycle is the FFN parts of both where they have a device of their
    own, else all parts of both."""
    requests = [SimulatedRequest(0.0, model, 16, 200) for model in range(2)]
    two = run(deployment(2), costs(), requests)
    assert two.seconds == pytest.approx(200 * 0.04, rel=0.02)
    one = run(deployment(2, weight_pool_devices=(Device("cuda:0"),)), costs(), requests)
    assert one.seconds == pytest.approx(200 * 2 * STEP, rel=0.02)


def test_a_sleeping_model_is_woken_first() -> None:
    d = deployment(2, weight_pool_bytes=OWN + OWN // 2, residency_quantum=1.0)
    requests = [SimulatedRequest(0.0, 0, 16, 2), SimulatedRequest(5.0, 1, 16, 2)]
    found = run(d, costs(), requests)
    first, second = found.outcomes
    attention = attention_bytes(SPEC)
    assert attention > OWN  # the KV pool's device has more to read, and both begin at once
    assert first.first == pytest.approx(STEP)
    assert second.first - 5.0 == pytest.approx(0.5 * attention / OWN + STEP)
    assert (found.wakes, found.woken_bytes) == (2, attention + OWN)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_lost_device_delays_requests_and_ends_none(device: str) -> None:
    requests = [*drawn(30, 2, 2.0), SimulatedRequest(5.0, 0, 64, 60)]
    requests.sort(key=lambda request: request.arrival)
    calm = run(deployment(2), costs(HOST), requests)
    found = run(deployment(2), costs(HOST), requests, losses=[DeviceLoss(device, 6.0, 3.0)])
    for request, outcome in zip(requests, found.outcomes, strict=True):
        assert (outcome.status, outcome.tokens) == (200, request.output)
    through = [
        (before, after)
        for before, after in zip(calm.outcomes, found.outcomes, strict=True)
        if before.first < 6.0 < before.last
    ]
    assert through and all(after.end >= before.end + 2.9 for before, after in through)
    with pytest.raises(ConfigError, match="cuda:9: there is no such device, only cuda:0, cuda:1"):
        run(deployment(), costs(), requests, losses=[DeviceLoss("cuda:9", 1.0, 1.0)])


def test_a_request_that_is_too_long_is_refused() -> None:
    d = deployment(max_queued_requests=1, max_running_requests=1)
    asked = [SimulatedRequest(0.0, 0, 4096, 1)] + [SimulatedRequest(1.0, 0, 16, 50)] * 3
    found = run(d, costs(), asked)
    assert [outcome.status for outcome in found.outcomes] == [400, 200, 200, 429]
