"""What is refused while a resident loop is on the device, and the streams that make no progress
beside it: over a fake driver."""

from __future__ import annotations

import logging

import pytest
from crosspool.kernels.cuda_loop import CudaLoop, CudaLoopError, LanePlaces, ModelStages
from crosspool.kernels.residency import Residency, ResidencyError
from crosspool.ranks.gpu.host_side import start_probed
from support import fake_cuda_graphs
from support.fake_cuda_graphs import FakeCuda
from support.loop_bench import LoopBench

needs_compiler = pytest.mark.skipif(fake_cuda_graphs.COMPILER is None, reason="no C++ compiler")


@needs_compiler
def test_a_loop_makes_nothing_beside_another(driver: FakeCuda) -> None:
    bench, waits = LoopBench(driver), "may wait for ever behind the resident loop"
    other = LoopBench(driver)
    bench.loop.start()
    with pytest.raises(CudaLoopError, match=f"allocating device memory of the loop: it {waits}"):
        CudaLoop([ModelStages((True,))], [LanePlaces(32, 32)], [1], native=driver.native)
    with pytest.raises(CudaLoopError, match=f"instantiating the graph for .*: it {waits}"):
        other.loop.add_graph(0, 0, 6, 0, driver.graph())
    with pytest.raises(CudaLoopError, match=f"freeing the loop: it {waits}"):
        other.loop.close()
    bench.loop.quiesce()
    other.loop.close()
    bench.close()


@needs_compiler
def test_a_loop_tells_its_residency(driver: FakeCuda) -> None:
    residency = Residency("cuda:3")
    bench = LoopBench(driver, residency=residency)
    residency.check("a stream")
    bench.loop.start()
    problem = r"^a stream: the resident loop on cuda:3 is on the device, so this may wait for ever"
    with pytest.raises(ResidencyError, match=problem):
        residency.check("a stream")
    with bench.loop.quiesced():
        residency.check("a stream")
    with pytest.raises(ResidencyError):
        residency.check("a stream")
    bench.close()
    residency.check("a stream")


def test_two_loops_of_a_device_both_count() -> None:
    residency = Residency("cuda:0")
    one, other = object(), object()
    for loop in (one, other, one):
        residency.enter(loop)
    residency.leave(one)
    with pytest.raises(ResidencyError):
        residency.check("a stream")
    residency.leave(other)
    residency.check("a stream")


def test_allocations_beside_a_loop_are_told(caplog: pytest.LogCaptureFixture) -> None:
    counts, loop = {"device memory of torch": 5, "page-locked memory of torch": 2}, object()
    residency = Residency("cuda:0", lambda: dict(counts))
    with caplog.at_level(logging.ERROR):
        residency.enter(loop)
        residency.leave(loop)
        counts["device memory of torch"] += 10  # while it is quiesced
        residency.enter(loop)
        assert caplog.text == ""
        counts["page-locked memory of torch"] += 3
        residency.leave(loop)
        residency.leave(loop)
    (record,) = caplog.records
    told = "page-locked memory of torch: the resident loop on cuda:0 was on the device during 3 "
    assert record.getMessage().startswith(told)


@needs_compiler
@pytest.mark.parametrize(
    ("connections", "stuck"),
    [
        (3, []),
        (2, ["the stream beside the lanes"]),
        (1, ["lane 1", "the stream beside the lanes"]),
    ],
)
def test_streams_that_share_a_connection_with_a_lane_are_named(
    driver: FakeCuda, connections: int, stuck: list[str]
) -> None:
    driver.connections(connections)
    residency = Residency("cuda:0")
    bench = LoopBench(driver, lanes=2, residency=residency)
    with driver.stream() as beside:
        bench.loop.start()
        assert bench.loop.probe(beside, 0.2) == stuck
        bench.loop.quiesce()
        if stuck:
            with pytest.raises(
                CudaLoopError,
                match=rf"no progress .* within 0\.2 s: {', '.join(stuck)}\. A stream shares its "
                "connection .*CUDA_DEVICE_MAX_CONNECTIONS is",
            ):
                start_probed(bench.loop, beside, 0.2)
            assert not residency.resident  # it has left the device
        else:
            start_probed(bench.loop, beside, 0.2)
        bench.loop.quiesce()
        driver.run(100)  # what the probe has queued ends
    bench.close()
