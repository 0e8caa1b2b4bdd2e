"""What is refused while a resident loop is on the device, and the streams that make no progress
beside it: over a fake driver."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import crosspool
import pytest
import torch
from crosspool.kernels.cuda_driver import CudaBindings
from crosspool.kernels.cuda_loop import CudaLoop, CudaLoopError, LanePlaces, ModelStages
from crosspool.kernels.residency import Residency, ResidencyError
from crosspool.ranks.gpu.host_side import HostSide, start_probed
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


def test_the_drivers_calls_that_may_wait_ask_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = MagicMock()
    success = bindings.driver.CUresult.CUDA_SUCCESS
    for name in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"):
        getattr(bindings.driver, name).return_value = (success, 1)
    for name in ("Create", "Release", "SetAccess", "Unmap", "Map", "GetAllocationGranularity"):
        getattr(bindings.driver, f"cuMem{name}").return_value = (success, 1)
    bindings.driver.cuDeviceGetAttribute.return_value = (success, 1)
    monkeypatch.setitem(sys.modules, "cuda", MagicMock(bindings=bindings))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    residency = Residency("cuda:0")
    driver, loop = CudaBindings(0, residency), object()
    calls = {
        "cuMemCreate": lambda: driver.create(1),
        "cuMemSetAccess": lambda: driver.set_access(0, 1),
        "cuMemUnmap": lambda: driver.unmap(0, 1),
        "cuMemRelease": lambda: driver.release(1),
    }
    residency.enter(loop)
    driver.map(0, 1, 1)  # does not wait
    for name, call in calls.items():
        with pytest.raises(ResidencyError, match=f"^{name}: the resident loop on cuda:0 is on"):
            call()
        getattr(bindings.driver, name).assert_not_called()
    residency.leave(loop)
    for name, call in calls.items():
        call()
        getattr(bindings.driver, name).assert_called_once()


def test_page_locked_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    host, loop = HostSide(torch.device("cpu")), object()
    assert host.full((2, 3), 7, torch.int32).tolist() == [[7] * 3] * 2
    host.residency.enter(loop)
    with pytest.raises(ResidencyError, match=r"^page-locked memory of 6 elements: the resident"):
        host.full((2, 3), 7, torch.int32)
    with pytest.raises(ResidencyError, match=r"^a stream: "):
        monkeypatch.setitem(sys.modules, "cuda", MagicMock())
        monkeypatch.setitem(sys.modules, "cuda.bindings", MagicMock())
        host.new_stream()


def test_memory_and_streams_are_made_in_one_place() -> None:
    """Elsewhere the package pins no memory, and takes no stream from torch's pool."""
    package = Path(crosspool.__file__).parent
    makes = re.compile(r"pin_memory|cuda\.Stream\(|cuStreamCreate|cuda\.graph\(")
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if makes.search(path.read_text())
    }
    assert found == {"ranks/gpu/host_side.py"}
