"""How a device starts: a resident loop comes last, nothing is allocated beside it, and every stage
that cannot be a graph is named. The resident loop's own code runs over a fake driver."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")

from crosspool.kernels.cuda_loop import CudaLoop, CudaLoopError, GPUStage, ModelStages
from crosspool.ranks.gpu import join, launch
from crosspool.ranks.gpu import lanes as gpu_lanes
from crosspool.ranks.gpu.attention import AttentionStages
from crosspool.ranks.gpu.flight import GPUFlight
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.transport.messages import Logprobs
from make_random_checkpoint import make_random_checkpoint
from support import fake_cuda_graphs
from support.fake_cuda_graphs import Node
from support.fake_resident import FakeResident
from support.few_programs import use_few_programs
from support.machine import Machine, Stream
from support.triton_device import load_interpreted
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="stages are called on CPU tensors"
    ),
    pytest.mark.skipif(fake_cuda_graphs.COMPILER is None, reason="no C++ compiler"),
]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeResident]:
    made = FakeResident(tmp_path_factory.mktemp("fake_cuda"))
    yield made
    made.cuda.close()


class PinsBeside(TorchFunctionMode):
    """Notes every call that says whether its memory is page-locked, and every kernel of torch's
    that makes memory out of a lane's, while a loop is on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.resident = 0
        self.found: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if self.resident and "pin_memory" in (named or {}):
            self.found.append(function.__name__)
        return function(*arguments, **(named or {}))


class MakesMemory(TorchDispatchMode):
    """Notes operations over the lanes' memory whose results lie elsewhere. On a GPU their memory
    would be the device's, or the host's unless it was page-locked before."""

    def __init__(self, lanes: list[LaneBuffers]) -> None:
        super().__init__()
        self._own = [_storage(tensor) for lane in lanes for tensor in (lane.arena, lane.words)]
        self.found: list[str] = []
        self.paused = False

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        lies_here = any(_storage(a) in self._own for a in given)
        known = [_storage(a) for a in (*given, *(named or {}).values()) if _is_tensor(a)]
        made = _is_tensor(result) and _storage(result) not in known
        if lies_here and made and not self.paused:
            self.found.append(str(function))
        return result


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_nothing_is_allocated_beside_the_loop(
    tmp_path: Path, cuda: FakeResident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device from its making to its end, with steps in which the host looks at logits."""
    use_few_programs(monkeypatch.setattr)
    vocab = 32
    path = make_random_checkpoint("qwen3_moe", tmp_path / "m", {"vocab_size": vocab}, "float32")
    monkeypatch.setattr(join, "join_loop", cuda.join_loop)
    lanes: list[LaneBuffers] = []

    class Known(LaneBuffers):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            lanes.append(self)

    monkeypatch.setattr(gpu_lanes, "LaneBuffers", Known)
    pins, looks = PinsBeside(), list[MakesMemory]()

    def started(loop: CudaLoop, start: Any = CudaLoop.start) -> None:
        start(loop)
        pins.resident += 1

    def left(loop: CudaLoop, timeout_s: float = 10.0, quiesce: Any = CudaLoop.quiesce) -> None:
        quiesce(loop, timeout_s)
        pins.resident = 0

    def look(*arguments: Any, look: Any = GPUFlight.look) -> None:
        with MakesMemory(lanes) as mode:
            looks.append(mode)
            look(*arguments)

    def logits(stages: AttentionStages, logits: Any = AttentionStages.logits) -> None:
        if looks:
            looks[-1].paused = True
        logits(stages)  # Triton's interpreter makes memory, its kernels do not
        if looks:
            looks[-1].paused = False

    monkeypatch.setattr(CudaLoop, "start", started)
    monkeypatch.setattr(CudaLoop, "quiesce", left)
    monkeypatch.setattr(GPUFlight, "look", look)
    monkeypatch.setattr(AttentionStages, "logits", logits)
    limits = {"max_running_requests": 1, "chunked_prefill_size": 2, "lease_steps": 2, "lanes": 1}
    asked = Logprobs(output=True, prompt_start=0, token_ids=(1,))
    with (
        pins,
        Machine([path], loop="resident", load=load_interpreted, **limits) as machine,
    ):
        machine.first.trace.start()
        stream = Stream(model=0, prompt=[5, 6, 7], new_tokens=2, chunk=2, logprobs=asked)
        machine.generate([stream], 1)
        machine.first.counters()
        machine.first.trace.stop()
    assert len(stream.output) == 2 and len(looks) >= 2
    assert pins.found == []
    assert [found for look in looks for found in look.found] == []
    assert cuda.cuda.live == 0 and cuda.cuda.violations == []


class _Graph:
    """A captured graph; ``refused``: why CUDA does not instantiate it for the host."""

    def __init__(self, graph: int, refused: str = "") -> None:
        self._graph, self._refused = graph, refused

    def raw_cuda_graph(self) -> int:
        return self._graph

    def instantiate(self) -> None:
        if self._refused:
            raise RuntimeError(self._refused)


BAD = ((0, 0, GPUStage.DENSE_FFN, 1), (1, 0, GPUStage.HEAD, 0))
"""Lane, model, stage and bucket of the two graphs that are refused."""


@pytest.mark.parametrize("resident", [True, False])
def test_every_refused_stage_is_named(
    cuda: FakeResident, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    driver, stages = cuda.cuda, [s for s in GPUStage if s < GPUStage.DISPATCH]
    graphs = {}
    for key in ((lane, 0, stage, b) for lane in (0, 1) for stage in stages for b in (0, 1)):
        bad = key in BAD
        graph = driver.graph(nodes=[(Node.HOST, None)] if bad else [])
        graphs[key] = _Graph(graph, "operation not supported" if bad else "")
    monkeypatch.setattr(gpu_lanes, "capture", lambda *_: (graphs, {}))
    native = functools.partial(CudaLoop, native=driver.native)
    monkeypatch.setattr(gpu_lanes, "CudaLoop", native)
    words = torch.zeros(32, dtype=torch.int32)
    aligned = words[-(words.data_ptr() // 4) % 8 :]
    lane: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), words=aligned, chosen=words, links=(), serves=False
    )
    with pytest.raises(CudaLoopError) as caught:
        gpu_lanes.join_loop(
            [ModelStages((False, True))],
            [lane, lane],
            {},
            [1, 8],
            host=HostSide(CPU),
            resident=resident,
        )
    first, *lines = str(caught.value).splitlines()
    assert first == "2 stages cannot be launched as graphs:"
    reason = "it holds a node of type 'host'" if resident else "operation not supported"
    for line, named in zip(
        lines,
        ("model 0, dense ffn, bucket of 8 rows, lane 0: ", "model 0, head, bucket of 1 rows, lane"),
        strict=True,
    ):
        assert line.startswith(named) and reason in line
    assert driver.live == 0 and driver.violations == []


class _Capture:
    """torch.cuda.CUDAGraph, as far as a capture goes."""

    made: ClassVar[list[_Capture]] = []

    def __init__(self, *, keep_graph: bool) -> None:
        assert keep_graph
        self.said: list[str] = []
        self.made.append(self)

    def capture_begin(self, *, capture_error_mode: str) -> None:
        self.said.append(capture_error_mode)

    def capture_end(self) -> None:
        self.said.append("end")


def test_a_stage_that_cannot_be_called_or_captured_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Warm-up of one stage fails, and the capture of another."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    host, called = HostSide(CPU), []
    host.stream = SimpleNamespace(synchronize=lambda: None, cuda_stream=7)  # type: ignore[assignment]
    monkeypatch.setattr(host, "beside", contextlib.nullcontext)

    def stage(name: str, failing: int) -> Any:
        def call() -> None:
            called.append(name)
            if called.count(name) == failing:
                raise ValueError(f"{name} fails")

        return call

    calls = {
        GPUStage.EMBED: stage("embed", 0),
        GPUStage.ATTENTION: stage("attention", 1),
        GPUStage.HEAD: stage("head", 2),
        GPUStage.DISPATCH: stage("dispatch", 0),
    }
    of_model: Any = {(0, 0, 0): SimpleNamespace(calls=calls, input_elements=1)}
    lane: Any = SimpleNamespace(words=torch.zeros(8, dtype=torch.int32))
    tails = []
    graphs, refused = launch.capture(
        [lane], of_model, {(0, 0, GPUStage.DISPATCH): tails.append}, host
    )
    assert [key[2] for key in graphs] == [GPUStage.EMBED, GPUStage.DISPATCH]
    assert {key[2]: reason for key, reason in refused.items()} == {
        GPUStage.ATTENTION: "calling it: ValueError: attention fails",
        GPUStage.HEAD: "capturing it: ValueError: head fails",
    }
    assert tails == [7]
    assert [graph.said for graph in _Capture.made] == [["thread_local", "end"]] * 3
