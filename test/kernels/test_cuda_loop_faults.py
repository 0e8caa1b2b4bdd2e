"""What a GPU's resident loop does when something is wrong, over a fake driver: each fault ends in a
message, and nothing is left behind."""

from __future__ import annotations

import pytest
from crosspool.kernels.cuda_loop import (
    CudaLoop,
    CudaLoopError,
    GPUStage,
    LanePlaces,
    LinkMemory,
    ModelStages,
)
from crosspool.kernels.engine_structs import DONE, LOGITS, TOKENS, Command
from support import fake_cuda_graphs
from support.fake_cuda_graphs import INVALID_VALUE, FakeCuda, Knob, Node
from support.loop_bench import LoopBench

pytestmark = pytest.mark.skipif(fake_cuda_graphs.COMPILER is None, reason="no C++ compiler")


@pytest.mark.parametrize(
    ("nodes", "empty", "message"),
    [
        ([(Node.HOST, None)], False, "'host'"),
        ([(Node.ALLOCATION, None)], False, "'allocation'"),
        ([], True, "empty"),
        ([(Node.EMPTY, None)], True, "'empty'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_graph_that_no_device_launches_is_refused(
    driver: FakeCuda, nodes: list[tuple[Node, None]], empty: bool, message: str, nested: bool
) -> None:
    bench = LoopBench(driver, leave_out=GPUStage.HEAD)
    graph = driver.graph(nodes=nodes, empty=empty)
    if nested:
        graph = driver.graph(nodes=[(Node.CHILD_GRAPH, graph)], empty=True)
    with pytest.raises(CudaLoopError, match=f"head of model 0, bucket 0.*{message}"):
        bench.loop.add_graph(0, 0, GPUStage.HEAD, 0, graph)
    bench.close()  # the driver itself was not asked: no violation


@pytest.mark.parametrize(
    ("knob", "violation", "error"),
    [
        (Knob.DROP_UPLOAD, "not uploaded", "was not launched: cudaErrorInvalidValue"),
        (Knob.DROP_DEVICE_LAUNCH, "not made for the device", "cudaErrorInvalidValue"),
        (Knob.RELAUNCH_TWICE, "second pending launch of itself", "could not launch itself again"),
        (Knob.FLOOD_TAILS, "more than 255", "cudaErrorLaunchPendingCountExceeded"),
    ],
)
def test_a_launch_beyond_the_limits_fails_the_lane(
    driver: FakeCuda, knob: Knob, violation: str, error: str
) -> None:
    """The fake driver notices what is documented not to work, and the host hears of it."""
    driver.turn(knob)
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step())
    bench.loop.start()
    with pytest.raises(CudaLoopError, match=error):
        bench.events()
    assert any(violation in text for text in driver.violations)
    with pytest.raises(CudaLoopError, match=error):  # it stays so
        bench.loop.pop()
    bench.loop.close()
    assert driver.live == 0


def test_a_lane_that_cannot_launch_itself_again_fails_alone(driver: FakeCuda) -> None:
    bench = LoopBench(driver, lanes=2, ticks=100)
    bench.loop.push_step(0, bench.step(0))
    driver.fail_relaunch(INVALID_VALUE)
    bench.loop.start()
    driver.run(20)
    bench.loop.push_step(1, bench.step(1))
    with pytest.raises(CudaLoopError, match=r"lane 0.*could not launch itself again"):
        bench.events(20)
    driver.run(4000)
    assert [stage for lane, stage, _, _ in bench.ran if lane == 0] == [GPUStage.EMBED]
    event = bench.loop.pop()
    assert event is not None and (event.kind, event.lane, event.step) == (DONE, 1, 1)
    bench.loop.close()


def test_a_refused_stage_fails_its_lane_alone(driver: FakeCuda) -> None:
    bench = LoopBench(driver, lanes=2)
    for lane in range(2):
        bench.loop.push_step(lane, bench.step(lane, lease=3))
    driver.fail_tail_launch(INVALID_VALUE)
    bench.loop.start()
    driver.run(20000)
    kinds, errors = [], 0
    for _ in range(10):
        try:
            event = bench.loop.pop()
        except CudaLoopError:
            errors += 1
        else:
            assert event is not None
            kinds.append(event.kind)
    assert kinds == [TOKENS, TOKENS, DONE]
    assert errors == 7
    bench.loop.close()


@pytest.mark.parametrize(
    ("call", "successes"),
    [("host_alloc", 0), ("stream_query", 0), ("stream_query", 3), ("launch", 0), ("launch", 1)]
    + [("device_alloc", n) for n in range(5)]
    + [("stream_create", n) for n in range(2)]
    + [("copy_to_device", n) for n in range(5)]
    + [("scheduler_graph", n) for n in range(2)]
    + [("instantiate", n) for n in range(8)],
)
def test_nothing_is_left_when_a_call_fails(driver: FakeCuda, call: str, successes: int) -> None:
    driver.fail_call(call, successes)
    bench = None
    with pytest.raises(CudaLoopError, match="cudaErrorInvalidValue"):
        bench = LoopBench(driver, lanes=2)
        bench.loop.start()
    if bench is not None:
        bench.loop.close()
    assert driver.violations == []
    if bench is not None or call != "instantiate":
        assert driver.live == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("bucket", 1),
        ("rows", 0),
        ("rows", 3),
        ("wanted", 3),
        ("lease", 0),
        ("for_host", 2),
    ],
)
def test_bad_arguments_fail_the_lane(driver: FakeCuda, field: str, value: int) -> None:
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step(**{field: value}))
    bench.loop.start()
    if (field, value) == ("for_host", 2):  # any other than 0 asks for the logits
        assert bench.events() == [(LOGITS, 1, 0)]
    else:
        with pytest.raises(CudaLoopError, match=f"the step's {field} contradicts"):
            bench.events()
        assert bench.ran == []
    bench.loop.close()


def test_a_lease_needs_a_token_per_row(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    bench.loop.push_step(0, bench.step(wanted=1, lease=2))
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="the step's lease contradicts"):
        bench.events()
    bench.loop.close()


def test_a_missing_graph_is_named(driver: FakeCuda) -> None:
    bench = LoopBench(driver, leave_out=GPUStage.MOE_FFN)
    bench.loop.push_step(0, bench.step())
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="layer 1: there is no graph for stage 4"):
        bench.events()
    bench.loop.close()


def test_a_host_that_never_resumes_fails_the_lane(driver: FakeCuda) -> None:
    bench = LoopBench(driver, wait_s=1e-4)
    bench.loop.push_step(0, bench.step(for_host=1))
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="waited too long in phase 5"):
        for _ in range(10):
            bench.events()
    bench.loop.close()


def test_a_stage_that_never_ends_is_noticed(driver: FakeCuda) -> None:
    bench = LoopBench(driver, ticks=10**9, wait_s=0.2)
    bench.loop.push_step(0, bench.step(3))
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="not come back from stage 0, layer 0, step 3"):
        bench.loop.wait(20.0)
    with pytest.raises(CudaLoopError, match="lane 0 does not leave"):
        bench.loop.quiesce(0.05)
    driver.fault_stage()  # ends it
    with pytest.raises(CudaLoopError, match="cudaErrorIllegalAddress"):
        bench.loop.quiesce()


def test_a_stage_that_faults_is_noticed(driver: FakeCuda) -> None:
    """A fault ends all that the device does; told once, the loop can be closed."""
    bench = LoopBench(driver, lanes=2)
    bench.loop.push_step(0, bench.step(lease=10**6))
    bench.loop.start()
    driver.run(3)
    driver.fault_stage()
    with pytest.raises(CudaLoopError, match="cudaErrorIllegalAddress"):
        for _ in range(3):
            bench.loop.wait(1.0)
            bench.events(0)
    with pytest.raises(CudaLoopError, match="cudaErrorIllegalAddress"):
        bench.loop.close()
    bench.close()


def test_what_contradicts_itself_is_refused_at_once(driver: FakeCuda) -> None:
    place, model = LanePlaces(words=32, chosen=32), ModelStages(kinds=(True,))
    linked = LanePlaces(words=32, chosen=32, links=(LinkMemory(0, 64, 2, 8),))

    def crossing(row_bytes: int) -> ModelStages:
        return ModelStages(kinds=(True,), row_bytes=row_bytes, links=(0,))

    for models, lanes, buckets, message in (
        ([model], [], [1], "a lane"),
        ([], [place], [1], "a model"),
        ([model], [place], [], "a row bucket"),
        ([model], [place], [2, 2], "ascend"),
        ([ModelStages(kinds=())], [place], [1], "no layer"),
        ([ModelStages(kinds=(True,), local=False)], [place], [1], "nowhere"),
        ([ModelStages(kinds=(True,), links=(0,))], [place], [1], "lane 0 does not have"),
        ([model], [LanePlaces(words=48, chosen=32)], [1], "aligned"),
        ([model], [LanePlaces(words=32, chosen=0)], [1], "chosen"),
        ([model], [LanePlaces(words=32, chosen=0, serves=True)], [1], "serves no link"),
        ([crossing(0)], [linked], [1], "row_bytes of 0 do not fit link 0 of lane 0"),
        ([crossing(9)], [linked], [1], "row_bytes of 9 do not fit link 0 of lane 0"),
    ):
        with pytest.raises(CudaLoopError, match=message):
            CudaLoop(models, lanes, buckets, native=driver.native)
    with pytest.raises(CudaLoopError, match="spin_ns must be less than wait_ns"):
        CudaLoop([model], [place], [1], spin_s=1.0, wait_s=1.0, native=driver.native)
    assert driver.live == 0


def test_what_is_not_there_is_refused(driver: FakeCuda) -> None:
    bench = LoopBench(driver)
    with pytest.raises(CudaLoopError, match="there is no lane 5"):
        bench.loop.add_graph(5, 0, GPUStage.HEAD, 0, driver.graph())
    with pytest.raises(CudaLoopError, match="bucket 1 lies outside the table"):
        bench.loop.add_graph(0, 0, GPUStage.HEAD, 1, driver.graph())
    with pytest.raises(CudaLoopError, match="only kResume and kRecall"):
        bench.loop._push(0, Command(3, 0, 0, None, 0))  # kStop is quiesce's
    bench.close()
