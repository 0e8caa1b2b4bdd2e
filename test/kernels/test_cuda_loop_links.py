"""A GPU's resident loop with a link, over a fake driver; at the other end is the test.

That rows arrive in every interleaving of two ends is checked by the native tests
(test_cuda_lanes.py)."""

from __future__ import annotations

import time

import pytest
from crosspool.kernels.cuda_loop import CudaLoopError, GPUStage, LanePhase
from crosspool.kernels.engine_structs import DONE
from crosspool.transport.heartbeats import Activity
from support import fake_cuda_graphs
from support.fake_cuda_graphs import FakeCuda
from support.loop_bench import ROW_BYTES, FakeLink, LoopBench

pytestmark = pytest.mark.skipif(fake_cuda_graphs.COMPILER is None, reason="no C++ compiler")


def test_a_predecessors_dispatch_is_answered_first(driver: FakeCuda) -> None:
    """A lane of a new attention rank waits for that, and leaves the device meanwhile if asked."""
    link = FakeLink()
    link.dispatched.value = 1
    bench = LoopBench(driver, link=link)
    bench.loop.push_step(0, bench.step(3))
    bench.loop.start()
    assert bench.events() == []
    assert bench.loop.status(0).phase == LanePhase.STAGE
    with bench.loop.quiesced():
        link.combined.value = 1
    for layer in range(2):
        assert bench.events() == []
        assert (link.dispatched.value, link.combined.value) == (2 + layer, 1 + layer)
        assert link.dispatch[2:] == [0, layer, 2, ROW_BYTES]
        assert bench.loop.status(0).phase == LanePhase.PEERS
        link.reply()
    assert bench.events() == [(DONE, 3, 0)]
    assert [stage for _, stage, _, _ in bench.ran] == [
        GPUStage.EMBED,
        *2 * [GPUStage.ATTENTION, GPUStage.DISPATCH, GPUStage.COMBINE],
        GPUStage.HEAD,
    ]
    bench.close()


def test_a_step_of_more_rows_than_a_link_takes_is_refused(driver: FakeCuda) -> None:
    bench = LoopBench(driver, link=FakeLink(max_rows=1))
    bench.loop.push_step(0, bench.step())
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="the step's rows contradicts"):
        bench.events()
    assert bench.ran == []
    bench.loop.close()


def test_an_answer_of_another_dispatch_fails_the_lane(driver: FakeCuda) -> None:
    link = FakeLink()
    bench = LoopBench(driver, link=link)
    bench.loop.push_step(0, bench.step())
    bench.loop.start()
    assert bench.events() == []
    link.dispatch[4] = 1
    link.reply()
    with pytest.raises(CudaLoopError, match="link 0 is not of its dispatch"):
        bench.events()
    bench.loop.close()


def test_an_answer_may_be_long_in_coming(driver: FakeCuda) -> None:
    """The process of an FFN rank that has died loads again, and then replies."""
    link = FakeLink()
    bench = LoopBench(driver, link=link, wait_s=1e-4)
    bench.loop.push_step(0, bench.step(3))
    bench.loop.start()
    for _ in range(2):
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            assert bench.events() == []
        assert bench.loop.activity([0])[0] == Activity.WAITING
        link.reply()
    assert bench.events() == [(DONE, 3, 0)]
    bench.close()


def test_a_predecessors_answer_may_be_long_in_coming(driver: FakeCuda) -> None:
    link = FakeLink()
    link.dispatched.value = 1
    bench = LoopBench(driver, link=link, wait_s=1e-4)
    bench.loop.push_step(0, bench.step(3))
    bench.loop.start()
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        assert bench.events() == []
    assert bench.loop.activity([0])[0] == Activity.WAITING
    link.combined.value = 1
    for _ in range(2):
        assert bench.events() == []
        link.reply()
    assert bench.events() == [(DONE, 3, 0)]
    bench.close()


def test_a_trace_tells_what_was_served(driver: FakeCuda) -> None:
    link = FakeLink()
    bench = LoopBench(driver, link=link, serves=True)
    bench.loop.trace_start()
    bench.loop.start()
    for number, (layer, rows) in enumerate([(1, 2), (0, 1)], start=1):
        link.dispatch[:] = [1, 0, 0, layer, rows, ROW_BYTES]
        link.dispatched.value = number
        bench.events()
        assert link.combined.value == number
    traced = bench.loop.trace_stop()
    assert [(stage.stage, stage.layer, stage.rows, stage.link) for stage in traced] == [
        (GPUStage.MOE_FFN, 1, 2, 0),
        (GPUStage.DENSE_FFN, 0, 1, 0),
    ]
    bench.close()


@pytest.mark.parametrize(
    "dispatch",
    [[1, 0, 1, 0, 2, ROW_BYTES], [1, 0, 0, 2, 2, ROW_BYTES], [1, 0, 0, 0, 3, ROW_BYTES]],
    ids=["model", "layer", "rows"],
)
def test_a_dispatch_that_fits_nothing_fails_the_lane(driver: FakeCuda, dispatch: list[int]) -> None:
    link = FakeLink()
    bench = LoopBench(driver, link=link, serves=True)
    bench.loop.start()
    link.dispatch[:] = dispatch
    link.dispatched.value = 1
    with pytest.raises(CudaLoopError, match="link 0 breaks the lane protocol or fits no model"):
        bench.events()
    assert bench.ran == []
    bench.loop.close()


def test_a_served_stage_that_never_ends_is_noticed(driver: FakeCuda) -> None:
    """Though no step was pushed to the lane."""
    link = FakeLink()
    bench = LoopBench(driver, link=link, serves=True, ticks=10**9, wait_s=0.2)
    bench.loop.start()
    link.dispatch[:] = [1, 0, 0, 1, 2, ROW_BYTES]
    link.dispatched.value = 1
    with pytest.raises(
        CudaLoopError, match=f"not come back from stage {GPUStage.MOE_FFN:d}, layer 1"
    ):
        bench.loop.wait(20.0)
    driver.fault_stage()  # ends it
