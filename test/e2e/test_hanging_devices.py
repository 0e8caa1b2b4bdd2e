"""Devices that hang although their processes live are replaced, and nothing is lost."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from crosspool.config.device import Device
from crosspool.config.runtime_dir import find_running
from crosspool.models.registry import specs_of
from crosspool.transport.lane_layout import LinkPlace
from crosspool.transport.links import ROW_ROOM, max_row_bytes
from crosspool.transport.shared_memory import _Segment
from make_random_checkpoint import make_random_checkpoint
from support.marks import slow_but
from support.server import DEMO, TINY_MODELS, Server, two_device_flags
from support.streams import Load, asks

CORES = sorted(os.sched_getaffinity(0))
HANG_TIMEOUT = 2
LONGEST_PROMPT = 16384
FLAGS = [
    *["--dtype", "float32", "--kv-pool-bytes", "256MiB", "--restart-limit", "100"],
    *["--lanes", "1", "--hang-timeout", str(HANG_TIMEOUT)],
    *["--chunked-prefill-size", str(LONGEST_PROMPT), "--tbt-target-ms", "0"],
]
SLOW = "slow"
SLOW_SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 512,
    "moe_intermediate_size": 4096,
    "num_experts": 8,
    "num_experts_per_tok": 8,
    "max_position_embeddings": LONGEST_PROMPT + 64,
}
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_ALL_CHILDREN = 0x40000000


@pytest.fixture(scope="module", params=slow_but(["resident"], ["resident", "host"]))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    if len(CORES) < 2:
        pytest.skip("needs two cores for two devices")
    slow = make_random_checkpoint(
        *("qwen3_moe", tmp_path_factory.mktemp("models") / SLOW, SLOW_SIZES),
        tokenizer=DEMO / TINY_MODELS[0],
    )
    flags = [*FLAGS, "--loop", request.param, *two_device_flags()]
    with Server(flags, models=[*TINY_MODELS, slow]) as running:
        yield running


def loop_of(server: Server) -> str:
    return str(find_running(server.port).loop)


def devices(server: Server) -> list[psutil.Process]:
    found = [p for p in server.processes() if "crosspool::device " in " ".join(p.cmdline())]
    return sorted(found, key=lambda process: process.cmdline())


def restarts(server: Server) -> int:
    return sum(device["restarts"] for device in server.get("/crosspool/status")["devices"])


def wait_until_back(server: Server, count: int) -> None:
    deadline = time.monotonic() + 60
    while restarts(server) < count or server.status("/health?strict=1") != 200:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


@contextmanager
def freezing(thread: int) -> Iterator[None]:
    """Freezes a single thread of a process, as no signal can: a debugger does it, until the thread
    has died. Skips the test where that is forbidden."""
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    frozen = threading.Event()
    errors: list[str] = []

    def hold() -> None:
        for request in (_SEIZE, _INTERRUPT):
            if library.ptrace(request, thread, None, None) != 0:
                errors.append(os.strerror(ctypes.get_errno()))
                frozen.set()
                return
        os.waitpid(thread, _ALL_CHILDREN)
        frozen.set()
        with suppress(ChildProcessError):  # its parent was faster
            os.waitpid(thread, _ALL_CHILDREN)

    holding = threading.Thread(target=hold, daemon=True)
    holding.start()
    assert frozen.wait(10)
    if errors:
        pytest.skip(f"threads cannot be frozen: {errors[0]}")
    yield
    holding.join(30)
    assert not holding.is_alive(), "the frozen thread lives"


def team_thread(process: psutil.Process) -> int:
    names = {
        int(folder.name): (folder / "comm").read_text().strip()
        for folder in Path(f"/proc/{process.pid}/task").iterdir()
    }
    (found,) = [thread for thread, name in names.items() if name == "team 0"]
    return found


@pytest.mark.parametrize("place", [0, 1], ids=["attention rank", "FFN rank"])
@pytest.mark.parametrize("kind", ["main", "team"])
def test_a_device_of_which_a_thread_hangs_is_replaced(
    server: Server, place: int, kind: str
) -> None:
    if kind == "team" and loop_of(server) == "host":
        pytest.skip("the host loop has no team of threads")
    load = Load(server, asks(TINY_MODELS, 6))
    before = restarts(server)
    with load.running():
        load.flow()
        device = devices(server)[place]
        with freezing(team_thread(device) if kind == "team" else device.pid):
            _, alive = psutil.wait_procs([device], timeout=10)
            assert not alive
        wait_until_back(server, before + 1)
        load.answer_all()
    assert not load.problems, load.problems[0]
    what = {"main": "main thread", "team": "loop"}[kind]
    assert f"{device_name(place)} hangs: its {what} has stood still for 2 s" in server.log
    assert restarts(server) == before + 1


def device_name(place: int) -> str:
    return Device(f"cpu:{CORES[place]}").process_name


def link_of(server: Server) -> tuple[mmap.mmap, LinkPlace]:
    """The segment of the server's lanes, and the place of the only link."""
    deployment = find_running(server.port)
    room = max(max_row_bytes(specs_of(deployment.models)), ROW_ROOM)
    segment = _Segment(deployment, room)
    folder = Path(f"/proc/{server.process.pid}/fd")
    for fd in folder.iterdir():
        if fd.stat().st_size == segment.total_bytes:
            with fd.open("r+b") as file:
                return mmap.mmap(file.fileno(), segment.total_bytes), segment.link(0, 0, 0)
    raise AssertionError("the launcher has no segment of lanes")


def test_devices_that_wait_for_a_lost_message_are_replaced(server: Server) -> None:
    if loop_of(server) == "host":
        pytest.skip("the host loop does not tell that it waits")
    memory, at = link_of(server)
    dispatched = ctypes.c_uint64.from_buffer(memory, at)
    combined = ctypes.c_uint64.from_buffer(memory, at + 128)
    load = Load(server, asks(TINY_MODELS, 6))
    before = restarts(server)
    with load.running():
        deadline = time.monotonic() + 60
        while True:  # until the FFN rank has not seen a dispatch before it vanishes
            assert time.monotonic() < deadline
            time.sleep(0.2)
            ffn = devices(server)[1]
            ffn.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            outstanding = dispatched.value != combined.value
            if outstanding:
                dispatched.value = combined.value
            ffn.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            if outstanding and dispatched.value == combined.value:
                break
        wait_until_back(server, before + 2)
        load.answer_all()
    assert not load.problems, load.problems[0]
    assert "hangs: for 2 s devices have waited for one another" in server.log


def test_a_long_part_of_a_step_is_no_hang(server: Server) -> None:
    """All experts of the model's only layer see every row of a long prompt, on one core."""
    before = restarts(server)

    def seconds(tokens: int) -> float:
        body = {
            "input_ids": [3 + (i * i + tokens) % 400 for i in range(tokens)],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        }
        began = time.monotonic()
        status, answer = server.post(f"/m/{SLOW}/generate", body)
        assert status == 200, answer
        return time.monotonic() - began

    seconds(64)
    prompt = 256
    while (took := seconds(prompt)) < 2.5 * HANG_TIMEOUT:
        assert prompt < LONGEST_PROMPT, f"a chunk of {prompt} rows takes only {took:.1f} s"
        prompt = min(LONGEST_PROMPT, int(prompt * min(8, 3.5 * HANG_TIMEOUT / took)))
    assert restarts(server) == before
