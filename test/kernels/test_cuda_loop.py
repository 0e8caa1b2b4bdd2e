"""The face of a GPU's resident loop, over a fake driver.

What it does when something is wrong: test_cuda_loop_faults.py. That the state machine takes the
right stages in every interleaving is checked by the native tests (test_cuda_lanes.py); that it runs
on a GPU, by test_cuda_loop_gpu.py."""

from __future__ import annotations

import ctypes
import time
from itertools import pairwise

import pytest
from crosspool.kernels import cuda_loop
from crosspool.kernels.cuda_loop import CudaLoopError, GPUStage, LanePhase
from crosspool.kernels.engine_structs import DONE, LOGITS, TOKENS
from support import fake_cuda_graphs
from support.fake_cuda_graphs import FakeCuda
from support.loop_bench import STAGES, LoopBench

pytestmark = pytest.mark.skipif(fake_cuda_graphs.COMPILER is None, reason="no C++ compiler")


def test_a_step_goes_through_its_stages(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step(7))
    bench.loop.start()
    assert bench.events() == [(DONE, 7, 0)]
    assert [(stage, layer) for _, stage, layer, _ in bench.ran] == [
        (GPUStage.EMBED, 0),
        (GPUStage.ATTENTION, 0),
        (GPUStage.DENSE_FFN, 0),
        (GPUStage.ATTENTION, 1),
        (GPUStage.MOE_FFN, 1),
        (GPUStage.HEAD, 2),
    ]
    assert list(bench.tokens) == [100, 101]
    assert bench.loop.status(0).launches == 6
    bench.close()


def test_a_lease_feeds_tokens_back_until_a_stop_token(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    stops, ends = (ctypes.c_int32 * 2)(104, 103), (ctypes.c_uint32 * 2)(1, 2)
    arguments = bench.step(lease=5, stops=ctypes.addressof(stops), stop_ends=ctypes.addressof(ends))
    bench.loop.push_step(0, arguments)
    bench.loop.start()
    # The first row's stop token 104 comes in the third step; 103 is the second row's and comes in
    # the second.
    assert bench.events() == [(TOKENS, 1, 0), (DONE, 1, 1)]
    assert list(bench.tokens) == [100, 101, 102, 103] + 6 * [0]
    assert [done for _, stage, _, done in bench.ran if stage == GPUStage.HEAD] == [0, 1]
    assert [stage for _, stage, _, _ in bench.ran if stage in STAGES[:2]] == [
        GPUStage.EMBED,
        GPUStage.FEED,
    ]
    bench.close()


def test_a_recall_ends_a_lease(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step(lease=1000))
    bench.loop.start()
    assert len(bench.events(200)) > 2
    bench.loop.push_recall(0, 1)
    assert bench.events()[-1][0] == DONE
    bench.close()


def test_the_host_may_look_at_logits(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step(1, for_host=1))
    bench.loop.push_step(0, bench.step(2))
    bench.loop.start()
    assert bench.events() == [(LOGITS, 1, 0)]
    assert bench.loop.status(0).phase == LanePhase.HOST
    bench.loop.push_resume(0, 1)
    assert bench.events() == [(DONE, 1, 0), (DONE, 2, 0)]
    bench.close()


def test_quiesced_nothing_runs_and_nothing_is_lost(driver: FakeCuda) -> None:
    bench = LoopBench(driver, lanes=2)
    for lane in range(2):
        bench.loop.push_step(lane, bench.step(lane, lease=30))
    bench.loop.start()
    before = bench.events(300)
    with pytest.raises(CudaLoopError, match="quiesce"):
        bench.loop.add_graph(0, 0, GPUStage.DISPATCH, 0, driver.graph())
    with bench.loop.quiesced():
        assert [bench.loop.status(lane).phase for lane in range(2)] == [
            LanePhase.NEXT,
            LanePhase.NEXT,
        ]
        ran = len(bench.ran)
        driver.run(1000)
        assert len(bench.ran) == ran
        assert [bench.loop.status(lane).left for lane in range(2)] == [1, 1]
        bench.loop.add_graph(0, 0, GPUStage.DISPATCH, 0, driver.graph())
    events = before + bench.events(20000)
    for lane in range(2):
        assert [first for _, step, first in events if step == lane] == list(range(30))
    bench.close()


def test_steps_beyond_a_lanes_room_are_refused(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    for number in range(cuda_loop.MAX_HELD):
        bench.loop.push_step(0, bench.step(number))
    with pytest.raises(CudaLoopError, match="8 steps already"):
        bench.loop.push_step(0, bench.step(8))
    bench.loop.start()
    assert [step for _, step, _ in bench.events()] == list(range(8))
    bench.loop.push_step(0, bench.step(8))
    assert bench.events() == [(DONE, 8, 0)]
    bench.close()


def test_a_trace_has_every_stage(driver: FakeCuda) -> None:
    bench = LoopBench(driver, lanes=2)
    for lane in range(2):
        bench.loop.push_step(lane, bench.step(7 + lane, lease=2))
    bench.loop.trace_start()
    bench.loop.start()
    bench.events()
    bench.loop.wait(0.0)
    traced = bench.loop.trace_stop()
    assert sorted(stage.end_ns for stage in traced) == [stage.end_ns for stage in traced]
    for lane in range(2):
        own = [stage for stage in traced if stage.lane == lane]
        ran = [(stage, layer) for on, stage, layer, _ in bench.ran if on == lane]
        assert [(stage.stage, stage.layer) for stage in own] == ran
        assert len(own) == 12
        assert {(stage.step, stage.model, stage.rows) for stage in own} == {(7 + lane, 0, 2)}
        for one, then in pairwise(own):
            assert one.start_ns < one.end_ns <= then.start_ns
    assert traced[-1].end_ns <= time.monotonic_ns()
    bench.loop.push_step(0, bench.step(9))
    bench.events()
    assert len(bench.ran) == 30
    assert bench.loop.trace_stop() == []
    bench.close()


def test_a_trace_keeps_the_latest(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    steps = cuda_loop.TRACE_ROOM // 6 + 2
    bench.loop.trace_start()
    bench.loop.push_step(0, bench.step(lease=steps))
    bench.loop.start()
    while bench.events(20_000)[-1][0] != DONE:
        pass
    traced = bench.loop.trace_stop()
    assert len(bench.ran) == 6 * steps > cuda_loop.TRACE_ROOM
    # The place of a stage that may be under way is left out.
    assert len(traced) == cuda_loop.TRACE_ROOM - 1
    ran = [(stage, layer) for _, stage, layer, _ in bench.ran[-len(traced) :]]
    assert [(stage.stage, stage.layer) for stage in traced] == ran
    bench.close()
