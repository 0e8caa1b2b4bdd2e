"""Cores of processes: teams run on those of their devices, all else on the others, if any."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from crosspool.config.cores import CONTROL_SLICE_NS, DEFAULT_SLICE_NS, keep_off, set_slice
from crosspool.config.deployment import Deployment, ModelConfig, save
from crosspool.config.device import Device

from benchmark.device_driver import DeviceDriver
from benchmark.server import DEMO

CORES = sorted(os.sched_getaffinity(0))
FIRST = f"cpu:{CORES[0]}"
T = TypeVar("T")
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs a core beside the device's")


def in_thread(work: Callable[[], T]) -> T:
    """Returns what ``work`` returns in a thread of its own, whose cores and slice end with it."""
    made: list[T] = []
    thread = threading.Thread(target=lambda: made.append(work()))
    thread.start()
    thread.join(10)
    return made[0]


@needs_two_cores
def test_a_thread_and_its_threads_keep_off_the_cores_of_devices() -> None:
    def cores() -> set[int]:
        keep_off([Device(FIRST), Device("cuda:0")])
        return in_thread(lambda: os.sched_getaffinity(0))

    assert in_thread(cores) == set(CORES[1:])
    assert os.sched_getaffinity(0) == set(CORES)


@pytest.mark.parametrize("names", [["cpu"], [f"cpu:{core}" for core in CORES], ["cuda:0"]])
def test_where_no_core_is_left_or_none_is_taken_all_may_be_used(names: list[str]) -> None:
    def cores() -> set[int]:
        keep_off([Device(name) for name in names])
        return os.sched_getaffinity(0)

    assert in_thread(cores) == set(CORES)


def slice_ns() -> int | None:
    """Time slice of the calling thread in ns; None where Linux does not report it."""
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/sched").read_text()
    except OSError:
        return None
    found = [line for line in text.splitlines() if line.startswith("se.slice ")]
    return int(found[0].rpartition(":")[2]) if found else None


def test_a_slice_is_set_and_inherited_and_given_up() -> None:
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    default = slice_ns()
    if default is None or release < (6, 12):
        pytest.skip("this Linux has no slices, or does not show them")

    def slices() -> tuple[int | None, int | None, int | None]:
        set_slice(CONTROL_SLICE_NS)
        own, inherited = slice_ns(), in_thread(slice_ns)
        set_slice(DEFAULT_SLICE_NS)
        return own, inherited, slice_ns()

    own, inherited, after = in_thread(slices)
    assert own == inherited == CONTROL_SLICE_NS
    assert after == default != CONTROL_SLICE_NS


@needs_two_cores
def test_a_device_s_core_is_left_to_its_team() -> None:
    with DeviceDriver([DEMO / "tiny-qwen3-moe"], [FIRST], [FIRST], loop="resident") as driver:
        (process,) = driver.processes.values()
        tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
        cores = {
            (task / "comm").read_text().strip(): os.sched_getaffinity(int(task.name))
            for task in tasks
        }
        assert cores["team 0"] == {CORES[0]}
        carriers = [name for name in cores if name.startswith("ZMQ")]
        assert len(carriers) >= 2
        assert all(cores[name] == set(CORES[1:]) for name in carriers)
        assert os.sched_getaffinity(process.pid) == set(CORES[1:])


@needs_two_cores
def test_front_end_processes_keep_off_the_devices_cores(tmp_path: Path) -> None:
    save(
        Deployment(
            models={0: ModelConfig(name="m", path=str(DEMO / "tiny-qwen3-moe"))},
            next_model=1,
            kv_pool_devices=(Device(FIRST),),
            weight_pool_devices=(Device(FIRST),),
            kv_pool_bytes=1 << 24,
            weight_pool_bytes=1 << 24,
            runtime_dir=str(tmp_path),
        )
    )
    code = (
        "import os, sys; from pathlib import Path; from crosspool.server.process import prepare;"
        "prepare('http', Path(sys.argv[1])); print(sorted(os.sched_getaffinity(0)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "deployment.json")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == str(CORES[1:])
