"""Device processes die and stop under streams, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence

import psutil
import pytest
from support.marks import slow_but
from support.server import TINY_MODELS, Server, two_device_flags
from support.streams import Load, asks

CORES = sorted(os.sched_getaffinity(0))
FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
FLAGS = ["--dtype", "float32", "--kv-pool-bytes", "64MiB", "--restart-limit", "1000"]
DEPLOYMENTS = {
    "both ranks on one device": ["--kv-pool-devices", FIRST, "--weight-pool-devices", FIRST],
    "two devices": two_device_flags() if len(CORES) > 1 else [],
    "two of each, TP": [
        *["--kv-pool-devices", f"{FIRST},{SECOND}"],
        *["--weight-pool-devices", f"{SECOND},{FIRST}"],
    ],
    "two FFN ranks, EP": [
        *["--kv-pool-devices", FIRST, "--weight-pool-devices", f"{SECOND},{FIRST}"],
        *["--ffn-parallel", "ep"],
    ],
}
PLACES = [(name, "resident") for name in DEPLOYMENTS] + [("two of each, TP", "host")]
"""The server does the same under either loop, so that the host loop is tried in one of them; what a
device does that comes back is tried in every place by test/ranks/test_device_process.py."""
FAST = [("two devices", "resident")]
UNLIKE = [*FAST, ("two of each, TP", "host")]
"""Places of either loop, with one rank on each device and with several."""


def within(places: Sequence[tuple[str, str]]) -> pytest.MarkDecorator:
    """Has a test try these places alone, where the others would show nothing else."""
    return pytest.mark.parametrize("server", slow_but(FAST, places), ids=", ".join, indirect=True)


def devices(server: Server) -> list[psutil.Process]:
    return [p for p in server.processes() if "crosspool::device " in " ".join(p.cmdline())]


def restarts(server: Server) -> int:
    return sum(device["restarts"] for device in server.get("/crosspool/status")["devices"])


def wait_until_back(server: Server, count: int, limit: float = 60) -> None:
    """Returns once the devices have been replaced ``count`` times and all of them work."""
    deadline = time.monotonic() + limit
    while restarts(server) < count or server.status("/health?strict=1") != 200:
        assert time.monotonic() < deadline, server.log
        assert server.status("/health") == 200
        time.sleep(0.05)


@pytest.fixture(
    scope="module",
    params=slow_but(FAST, PLACES),
    ids=", ".join,
)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    name, loop = request.param
    if len(CORES) < 2 and name != "both ranks on one device":
        pytest.skip("needs two cores for two devices")
    with Server([*FLAGS, *DEPLOYMENTS[name], "--loop", loop]) as running:
        yield running


def test_killed_devices_lose_no_request_and_change_no_token(server: Server) -> None:
    load = Load(server, asks(TINY_MODELS, 12))
    before = restarts(server)
    with load.running():
        for number in range(3):
            load.flow()
            time.sleep(0.1 * number)
            processes = devices(server)
            processes[number % len(processes)].kill()
            wait_until_back(server, before + number + 1)
        load.answer_all()
    assert not load.problems, load.problems[0]
    status = server.get("/crosspool/status")
    assert sum(device["seconds_away"] for device in status["devices"]) > 0
    assert sum(model["replayed_requests"] for model in status["models"]) > 0
    assert all(rank["promised_bytes"] == 0 for rank in status["ranks"])
    assert server.log.count("it is started again (restart") == restarts(server)
    if (
        "resident" in server.process.args
    ):  # a process that takes a dead one's place reads no weights
        assert server.log.count("of matrices packed into") == len(TINY_MODELS) * len(processes)


@within([place for place in PLACES if place[0] != "both ranks on one device"])
def test_all_devices_die_at_once_and_once_more_while_they_come_back(server: Server) -> None:
    load = Load(server, asks(TINY_MODELS, 6))
    before, count = restarts(server), len(devices(server))
    with load.running():
        load.flow()
        for _ in range(2):
            for process in devices(server):
                process.kill()
            time.sleep(0.8)
        wait_until_back(server, before + count)
        load.answer_all()
    assert not load.problems, load.problems[0]


@within(UNLIKE)
def test_a_stopped_device_is_replaced_in_seconds(server: Server) -> None:
    load = Load(server, asks(TINY_MODELS, 6))
    before = restarts(server)
    with load.running():
        for number, process in enumerate(devices(server)):
            load.flow()
            process.suspend()
            _, alive = psutil.wait_procs([process], timeout=10)
            assert not alive
            wait_until_back(server, before + number + 1)
        load.answer_all()
    assert not load.problems, load.problems[0]


def incarnation(server: Server) -> int:
    """The number of the scheduler; 0 while none answers."""
    try:
        return int(server.get("/crosspool/status")["incarnation"])
    except (OSError, KeyError, AssertionError):
        return 0


def wait_for_scheduler(server: Server, number: int, limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while incarnation(server) != number or server.status("/health?strict=1") != 200:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


def kill(server: Server, name: str) -> None:
    """Kills the process ``name`` as soon as there is one."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(StopIteration, psutil.NoSuchProcess):
            next(p for p in server.processes() if name in " ".join(p.cmdline())).kill()
            return
        assert time.monotonic() < deadline, server.log
        time.sleep(0.01)


@within(UNLIKE)
def test_another_scheduler_goes_on_with_every_request(server: Server) -> None:
    """One is killed, and one gives up since nobody compiles grammars for it any more."""
    load = Load(server, asks(TINY_MODELS, 12))
    number = incarnation(server)
    with load.running():
        for victim in ("scheduler", "grammars"):
            load.flow()
            kill(server, f"crosspool::{victim}")
            number += 1
            wait_for_scheduler(server, number)
        load.answer_all()
    assert not load.problems, load.problems[0]
    status = server.get("/crosspool/status")
    assert all(rank["promised_bytes"] == 0 for rank in status["ranks"])
    assert not any(model["running"] or model["waiting"] for model in status["models"])


@within(UNLIKE)
def test_the_scheduler_dies_with_everything_else_and_once_more(server: Server) -> None:
    load = Load(server, asks(TINY_MODELS, 9))
    number = incarnation(server)
    with load.running():
        load.flow()
        for others in (["crosspool::device"], ["crosspool::detokenizer", "crosspool::device"]):
            for name in (*others, "crosspool::scheduler"):
                kill(server, name)
            time.sleep(0.6)
        wait_for_scheduler(server, number + 2)
        devices(server)[-1].kill()  # while its requests are being computed again
        time.sleep(0.1)
        kill(server, "crosspool::scheduler")
        wait_for_scheduler(server, number + 3)
        load.answer_all()
    assert not load.problems, load.problems[0]


@within(UNLIKE)
def test_a_stopped_scheduler_is_replaced_in_seconds(server: Server) -> None:
    load = Load(server, asks(TINY_MODELS, 6))
    number = incarnation(server)
    with load.running():
        load.flow()
        process = server.find("crosspool::scheduler")
        process.suspend()
        _, alive = psutil.wait_procs([process], timeout=10)
        assert not alive
        wait_for_scheduler(server, number + 1)
        load.answer_all()
    assert not load.problems, load.problems[0]


def test_a_device_that_dies_at_each_start_ends_the_server() -> None:
    flags = ["--kv-pool-bytes", "64MiB", "--restart-limit", "2"]
    with Server(flags, models=TINY_MODELS[:1]) as server:
        family, killed = server.processes(), set[int]()
        deadline = time.monotonic() + 60
        while server.process.poll() is None:
            assert time.monotonic() < deadline, server.log
            with contextlib.suppress(psutil.NoSuchProcess):
                for device in devices(server):
                    if device.pid not in killed:
                        killed.add(device.pid)
                        device.kill()
        assert server.process.returncode == 1
        assert len(killed) == 3
        told = "crosspool: device process cpu was killed by SIGKILL"
        lines = [line for line in server.log.splitlines() if line.startswith(told)]
        assert [line.removeprefix(told) for line in lines] == [
            "; it is started again (restart 1)",
            "; it is started again (restart 2)",
            "",
        ]
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
