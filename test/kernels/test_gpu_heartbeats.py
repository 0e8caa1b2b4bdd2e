"""What a GPU's loop shows the launcher, so that a kernel that never ends is noticed and a lane that
waits for another device is not taken for one: the resident loop over the fake driver."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from crosspool.cli.hangs import HangWatch
from crosspool.config.device import Device
from crosspool.kernels.cuda_loop import GPUStage
from crosspool.kernels.engine_structs import DONE, Event
from crosspool.transport.heartbeats import Activity, Heartbeat, Heartbeats
from support import fake_cuda_graphs
from support.fake_cuda_graphs import FakeCuda
from support.loop_bench import ROW_BYTES, FakeLink, LoopBench
from support.one_gpu import OneGPU, step

needs_compiler = pytest.mark.skipif(fake_cuda_graphs.COMPILER is None, reason="no C++ compiler")
DEVICES = [Device("cuda:0")]
PATIENCE = 5.0


class Watched:
    """The launcher's side of one GPU."""

    def __init__(self) -> None:
        self.heartbeats = Heartbeats(DEVICES)
        self.heartbeat = Heartbeat(DEVICES, DEVICES[0], self.heartbeats.fd, 1)
        self.now = 0.0
        self.watch = HangWatch(self.heartbeats, ["cuda:0"], PATIENCE, lambda: self.now)

    @property
    def activity(self) -> int:
        return self.heartbeats.read(0).activity

    def live(
        self, seconds: float, turn: Callable[[], object] = lambda: None
    ) -> dict[tuple[str, int], str]:
        """Lets time pass in which the process's main thread goes on, and does ``turn``."""
        found: dict[tuple[str, int], str] = {}
        for _ in range(int(seconds / 0.25)):
            self.now += 0.25
            self.heartbeat.beat()
            turn()
            found |= self.watch.look(())
        return found


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.heartbeats.close()


class NotedLoop:
    """Does what the test says."""

    def __init__(self) -> None:
        self.does = Activity.COMPUTING
        self.looks = 0
        self.stands = False
        self.asked: list[set[int]] = []
        self.event: Event | None = None

    def push_step(self, lane: int, arguments: Any) -> None:
        self.arguments = arguments

    def wait(self, _timeout_s: float) -> bool:
        return self.event is not None

    def pop(self) -> Event | None:
        event, self.event = self.event, None
        return event

    def activity(self, stepping: Any) -> tuple[Activity, int, int]:
        self.asked.append(set(stepping))
        self.looks += not self.stands
        return (self.does if stepping else Activity.IDLE), self.looks, 7

    def quiesced(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        pass


def test_the_executor_shows_what_the_loop_does(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown in any case is that nothing is left to do: the next look may be long in coming."""
    monkeypatch.setattr("crosspool.ranks.gpu.executor._SHOW_SECONDS", 0.0)
    loop = NotedLoop()
    gpu = OneGPU(loop, heartbeat=watched.heartbeat)

    def turn() -> list[Any]:
        return gpu.executor.run(0.0)

    assert not watched.live(60, turn)
    assert watched.activity == Activity.IDLE
    gpu.executor.submit(step(1))
    turn()
    assert loop.asked[-1] == {0} and watched.activity == Activity.COMPUTING
    assert not watched.live(PATIENCE - 1, turn)  # though the other lane looks for work
    assert list(watched.live(2, turn)) == [("cuda:0", 1)]
    monkeypatch.setattr("crosspool.ranks.gpu.executor._SHOW_SECONDS", 3600.0)
    turn()
    asked = len(loop.asked)
    turn()
    assert len(loop.asked) == asked  # not so often
    loop.event = Event(DONE, 0, 1, 0, 1, loop.arguments.tokens)
    turn()
    assert watched.activity == Activity.IDLE
    assert not watched.live(60, turn)
    loop.stands = True
    assert list(watched.live(PATIENCE + 1, turn)) == [("cuda:0", 1)]


@needs_compiler
def test_a_stage_that_never_ends_is_a_hang(driver: FakeCuda, watched: Watched) -> None:
    bench = LoopBench(driver, ticks=10**9)
    bench.loop.push_step(0, bench.step(3))
    watched.heartbeat.show(*bench.loop.activity([0]))
    assert watched.activity == Activity.COMPUTING  # the lane has not even begun
    bench.loop.start()
    bench.events()
    watched.heartbeat.show(*bench.loop.activity([0]))
    assert not watched.live(PATIENCE - 1)
    bench.events()
    watched.heartbeat.show(*bench.loop.activity([0]))
    assert list(watched.live(2)) == [("cuda:0", 1)]
    driver.fault_stage()  # ends it


@needs_compiler
def test_a_long_step_is_no_hang(driver: FakeCuda, watched: Watched) -> None:
    """Every stage counts."""
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step(lease=10**6))
    bench.loop.start()
    for _ in range(20):
        bench.events(20)
        watched.heartbeat.show(*bench.loop.activity([0]))
        assert watched.activity == Activity.COMPUTING
        assert not watched.live(PATIENCE - 1)
    bench.loop.push_recall(0, 1)
    assert (DONE, 1) in [event[:2] for event in bench.events()]
    bench.close()


@needs_compiler
def test_a_lane_waits_for_its_host_or_for_a_dispatch_without_a_hang(
    driver: FakeCuda, watched: Watched
) -> None:
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step(for_host=1))
    bench.loop.start()
    bench.events()
    assert bench.loop.activity([0])[0] == Activity.IDLE
    bench.loop.push_resume(0, 1)
    bench.events()
    bench.close()
    link = FakeLink()
    serving = LoopBench(driver, link=link, serves=True)
    serving.loop.start()
    serving.events()
    assert serving.loop.activity([])[::2] == (Activity.IDLE, 0)
    link.dispatch[:] = [1, 0, 0, 1, 2, ROW_BYTES]
    link.dispatched.value = 1
    serving.events()
    assert serving.ran == [(0, GPUStage.MOE_FFN, 1, 0)]
    assert serving.loop.activity([])[::2] == (Activity.IDLE, 1)
    serving.close()
