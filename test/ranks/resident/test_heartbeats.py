"""Real loops count while they compute, also within a part, and tell what they do."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels.advance import count_advances
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.device_process import load_ranks
from crosspool.transport.heartbeats import Activity, Beat, Heartbeat, Heartbeats
from make_random_checkpoint import make_random_checkpoint
from support.machine import Machine, Stream

CORES = sorted(os.sched_getaffinity(0))
ROWS = 200
WIDTH = 4096
"""Width of an expert; there are two, which every row chooses."""
_PANEL_GROUP = 4 * 16
_PARTS = 3
"""Number of parts of a step of one layer: attention, FFN, LM head."""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "moe_intermediate_size": WIDTH,
        "num_experts": 2,
        "num_experts_per_tok": 2,
    }
    return make_random_checkpoint("qwen3_moe", tmp_path_factory.mktemp("wide") / "model", sizes)


@contextmanager
def watched(
    model: Path, loop: Literal["host", "resident"], kv: str, weights: str
) -> Iterator[tuple[Machine, Heartbeats]]:
    devices = list(dict.fromkeys((Device(kv), Device(weights))))
    heartbeats = Heartbeats(devices)

    def load(deployment: Deployment, device: Device, *rest: Any) -> DeviceRanks:
        assert list(deployment.devices) == devices
        heartbeat = Heartbeat(devices, device, heartbeats.fd, 1)
        return load_ranks(deployment, device, *rest, heartbeat=heartbeat)

    with Machine([model], loop=loop, kv=kv, weights=(weights,), load=load) as machine:
        yield machine, heartbeats
    count_advances(None)
    heartbeats.close()


def counts(beat: Beat) -> int:
    return beat.process + beat.advances


@pytest.mark.parametrize("loop", ["host", "resident"])
def test_a_loop_counts_within_a_part(wide_model: Path, loop: Any) -> None:
    core = f"cpu:{CORES[0]}"
    with watched(wide_model, loop, core, core) as (machine, heartbeats):
        before = heartbeats.read(0)
        assert before.activity == Activity.IDLE
        machine.generate([Stream(0, list(range(3, 3 + ROWS)), 1)])
        counted = counts(heartbeats.read(0)) - counts(before)
    if loop == "host":  # after every product
        assert counted > 2 * _PARTS
        return
    # Two matrices for gate and up and one for down, of two experts, in groups of panels.
    assert counted > 2 * 2 * WIDTH / _PANEL_GROUP
    assert counted > 20 * _PARTS


def test_an_idle_loop_does_not_count(wide_model: Path) -> None:
    core = f"cpu:{CORES[0]}"
    with watched(wide_model, "resident", core, core) as (machine, heartbeats):
        machine.generate([Stream(0, [3, 4, 5], 2)])
        deadline = time.monotonic() + 5
        while heartbeats.read(0).activity != Activity.IDLE:
            assert time.monotonic() < deadline
        before = heartbeats.read(0)
        time.sleep(0.2)
        assert heartbeats.read(0).advances == before.advances


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_loops_tell_who_computes_and_who_waits(wide_model: Path) -> None:
    first, second = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
    with watched(wide_model, "resident", first, second) as (machine, heartbeats):
        seen = Counter[tuple[Activity, Activity]]()
        ended = threading.Event()

        def look() -> None:
            while not ended.is_set():
                seen[heartbeats.read(0).activity, heartbeats.read(1).activity] += 1

        looking = threading.Thread(target=look)
        looking.start()
        try:
            deadline = time.monotonic() + 60
            while not seen[Activity.WAITING, Activity.COMPUTING]:  # looks may lack a core
                assert time.monotonic() < deadline, seen
                machine.generate([Stream(0, list(range(3, 3 + ROWS)), 8)])
        finally:
            ended.set()
            looking.join()
        assert heartbeats.read(1).advances > 2 * WIDTH / _PANEL_GROUP
