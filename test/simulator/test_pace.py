"""The pace of lanes against a simulation of every part of every layer."""

from __future__ import annotations

import heapq
from itertools import count

import numpy as np
import pytest
from crosspool.simulator.pace import StepLoad, cycles

ATTENTION, FFN = 0, 1


def seconds_per_layer(lanes: list[tuple[float, float]], layers: int = 400) -> float:
    """Parts of lanes in turns on two devices, each part after the one before it of its lane; first
    come, first served."""
    number = count()
    ready = [(0.0, next(number), lane, 0) for lane in range(len(lanes))]
    heapq.heapify(ready)
    free = [0.0, 0.0]
    done = 0.0
    while ready:
        at, _, lane, part = heapq.heappop(ready)
        device = part % 2
        end = max(at, free[device]) + lanes[lane][device]
        free[device] = end
        if part + 1 < 2 * layers:
            heapq.heappush(ready, (end, next(number), lane, part + 1))
        else:
            done = max(done, end)
    return done / layers


def load(rank: int, attention: float, ffn: float, device: int = FFN) -> StepLoad:
    devices = {rank if rank else ATTENTION: attention}
    devices[device] = devices.get(device, 0.0) + ffn
    return StepLoad(rank, 1, devices, attention + ffn)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [1, 2, 3])
def test_lanes_of_two_devices(number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lanes = [(float(a), float(f)) for a, f in rng.uniform(0.5, 2.0, (number, 2))]
    found = cycles(load(0, a, f) for a, f in lanes)
    assert found[0] == pytest.approx(seconds_per_layer(lanes), rel=0.03)


def test_one_device_does_one_part_at_a_time() -> None:
    assert cycles([load(0, 1.0, 2.0, 0), load(0, 3.0, 4.0, 0)]) == {0: 10.0}


def test_ranks_share_a_device_that_is_too_slow_for_them() -> None:
    ranks = [load(rank, 1.0, 2.0, device=9) for rank in (1, 2, 3)]
    assert cycles(ranks) == pytest.approx({1: 6.0, 2: 6.0, 3: 6.0})
    # the slow one takes a tenth of the device, and the other two share the rest
    slow = StepLoad(1, 1, {1: 20.0, 9: 2.0}, 20.0)
    assert cycles([slow, *ranks[1:]]) == pytest.approx({1: 20.0, 2: 4 / 0.9, 3: 4 / 0.9})


def test_a_step_of_many_layers_is_no_faster_for_them() -> None:
    assert cycles([StepLoad(0, 8, {0: 8.0, 1: 16.0}, 24.0)]) == {0: 3.0}
