"""The GPU report where there is no GPU: stages in Triton's interpreter, the resident loop over the
fake driver, virtual memory of the CPU; and faults to plant in them.

    python -m support.fake_gpu_report --library LIB [--plant FAULT ...] [words of the report]

LIB is what :func:`support.fake_cuda_graphs.build` makes. The report's processes start here too.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmark.gpu_report.__main__ import main
from benchmark.gpu_report.platform import CapturedStage, Scale

if TYPE_CHECKING:
    import torch
    from crosspool.kernels.cuda_driver import CudaDriver
    from crosspool.kernels.cuda_loop import CudaLoop, GPUStage, ModelStages
    from crosspool.ranks.gpu.host_side import HostSide
    from crosspool.ranks.gpu.launch import Key, Refused
    from crosspool.ranks.gpu.scratch import LaneBuffers
    from crosspool.ranks.gpu.stages import HasStages
    from support.fake_resident import FakeResident

NAME = "CPU, interpreted, fake driver: times mean nothing"
SCALE = Scale(
    layers=2,
    buckets=(1,),
    prompts=1,
    prompt_tokens=1,
    new_tokens=2,
    steps=2,
    shape="tiny-deepseek-v2",
    batches=(1,),
    context=3,
    tokens=1,
    rounds=1,
    chunk_mib=(2,),
    chunks=8,
    tests=("test/kvpool",),
)


@dataclass(frozen=True)
class Plant:
    """A fault in the graph of one stage."""

    family: str
    stage: str
    layer: int
    check: str | None = None
    """The only check that has it."""


PLANTS = {
    # Of the stages for rows that leave the device, so that lanes of one device go on.
    "refused": Plant("glm4_moe_lite", "COMBINE", 0),
    "hang": Plant("qwen3_moe", "ATTENTION", 1, "resident steps"),
    "wrong": Plant("deepseek_v2", "MOE_FFN", 1),
}


class FakePlatform:
    """The platform that the checks get."""

    name, is_gpu, scale = NAME, False, SCALE

    def __init__(self, library: Path, plants: Sequence[str], check: str) -> None:
        """``plants``: names of faults; ``check``: the check that is run."""
        self.library = library
        self.plants = [name for name in plants if PLANTS[name].check in (None, check)]

    @functools.cached_property
    def device(self) -> torch.device:
        import torch
        from support import triton_interpreter
        from support.few_programs import use_few_programs

        triton_interpreter.repair()
        torch.set_num_threads(1)
        use_few_programs(setattr)
        return torch.device("cpu")

    @functools.cached_property
    def host(self) -> HostSide:
        from crosspool.ranks.gpu.host_side import HostSide

        return HostSide(self.device)

    @functools.cached_property
    def fake(self) -> FakeResident:
        from support.fake_resident import FakeResident

        return FakeResident(self.library.parent, self.library)

    def synchronize(self) -> None:
        pass

    def capture(
        self, lanes: Sequence[LaneBuffers], stages: Mapping[tuple[int, int, int], HasStages]
    ) -> tuple[Mapping[Key, CapturedStage], Refused]:
        """Warms up as the product does, with 0 rows, and makes graphs of the fake driver of the
        stages that can be called so."""
        import torch
        from crosspool.ranks.gpu.launch import words

        elements = max(of_model.input_elements for of_model in stages.values())
        empty = torch.zeros(max(1, elements), dtype=torch.int32)
        graphs: dict[Key, CapturedStage] = {}
        refused: Refused = {}
        for lane in lanes:
            lane.words.copy_(words(empty.data_ptr(), rows=0, done=0))
        for (lane_index, model, bucket), of_model in stages.items():
            for stage, call in of_model.calls.items():
                key = lane_index, model, stage, bucket
                try:
                    call()
                except Exception as error:
                    refused[key] = f"calling it: {type(error).__name__}: {error}"
                    continue
                body = self._planted(lanes[lane_index], of_model, stage, call)
                graphs[key] = self._graph(of_model, stage, body)
        return graphs, refused

    def instantiate(self, graph: CapturedStage) -> None:
        pass

    def node_types(self, graph: CapturedStage) -> list[str]:
        assert isinstance(graph, _Graph)
        return graph.types

    def loop(
        self, models: Sequence[ModelStages], lanes: Sequence[LaneBuffers], buckets: Sequence[int]
    ) -> CudaLoop:
        from crosspool.kernels.cuda_loop import CudaLoop
        from crosspool.ranks.gpu.lanes import loop_places

        return CudaLoop(models, loop_places(lanes), buckets, native=self.fake.cuda.native)

    def join(
        self,
        models: Sequence[ModelStages],
        lanes: Sequence[LaneBuffers],
        stages: Mapping[tuple[int, int, int], HasStages],
        buckets: Sequence[int],
        *,
        host: HostSide,
        resident: bool,
    ) -> Any:
        from crosspool.ranks.gpu.launch import EagerLauncher
        from crosspool.ranks.gpu.loop import HostLaunchedLoop

        planted: Any = {
            key: SimpleNamespace(
                calls={
                    stage: self._planted(lanes[key[0]], of_model, stage, call)
                    for stage, call in of_model.calls.items()
                }
            )
            for key, of_model in stages.items()
        }
        if not resident:
            return HostLaunchedLoop(models, len(lanes), EagerLauncher(lanes, planted))
        return self.fake.join_loop(
            models,
            lanes,
            planted,
            buckets,
            host=host,
            resident=True,
            watch=None,
            exchange=None,
            epoch=1,
            tails={},
        )

    def driver(self) -> CudaDriver:
        from support.fake_cuda_memory import FakeCuda

        return FakeCuda(64 << 20)

    def _planted(
        self,
        lane: LaneBuffers,
        of_model: Any,
        stage: GPUStage,
        call: Callable[[], None],
    ) -> Callable[[], None]:
        """A stage's call, with the faults that are planted in it."""
        wrong = self._is_planted("wrong", of_model, stage)
        hang = self._is_planted("hang", of_model, stage)

        def body() -> None:
            if hang and int(lane.layer) == PLANTS["hang"].layer:
                threading.Event().wait()
            call()
            if wrong and int(lane.layer) == PLANTS["wrong"].layer:
                of_model.scratch.partial.mul_(-1.5)

        return body if wrong or hang else call

    def _graph(self, of_model: Any, stage: GPUStage, body: Callable[[], None]) -> CapturedStage:
        from support.fake_cuda_graphs import Node

        if self._is_planted("refused", of_model, stage):
            host = self.fake.cuda.graph(body, nodes=[(Node.HOST, None)])
            return _Graph(body, host, ["Kernel", "Host"])
        return _Graph(body, self.fake.cuda.graph(body), ["Kernel"])

    def _is_planted(self, fault: str, of_model: Any, stage: GPUStage) -> bool:
        plant, model = PLANTS[fault], getattr(of_model, "model", None)
        return (
            fault in self.plants
            and model is not None
            and (model.spec.family, stage.name) == (plant.family, plant.stage)
        )


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], None]
    graph: int
    types: list[str]

    def raw_cuda_graph(self) -> int:
        return self.graph


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--plant", choices=sorted(PLANTS), action="append", default=[])
    known, rest = parser.parse_known_args()
    check = rest[rest.index("--check") + 1] if "--check" in rest else ""
    again = [sys.executable, "-m", "support.fake_gpu_report", f"--library={known.library}"]
    again += [f"--plant={plant}" for plant in known.plant]
    sys.exit(main(rest, lambda: FakePlatform(known.library, known.plant, check), again))
