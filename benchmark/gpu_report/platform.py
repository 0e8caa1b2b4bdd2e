"""The seam between the checks and the machine: where tensors lie, how stages are captured, who
drives them, where virtual memory comes from.

:class:`CudaPlatform` is a GPU. The tests put another one in its place, which has no GPU and says so
in its name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from benchmark.records import ROOT

if TYPE_CHECKING:
    import torch
    from crosspool.kernels.cuda_driver import CudaDriver
    from crosspool.kernels.cuda_loop import CudaLoop, ModelStages
    from crosspool.ranks.gpu.host_side import HostSide
    from crosspool.ranks.gpu.launch import Key, Refused
    from crosspool.ranks.gpu.scratch import LaneBuffers
    from crosspool.ranks.gpu.stages import HasStages

    from benchmark.gpu_lanes import Join

_ENVIRONMENT = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "CUDA_MODULE_LOADING": "EAGER",
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
}
"""What CUDA and Triton read when they start, unless given. No kernel is loaded later, behind a
resident loop, no stream shares a connection with one, and all checks find the same compiled
kernels."""


@dataclass(frozen=True)
class Scale:
    """How much the checks do."""

    models: tuple[str, ...] = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
    """Bundled models."""
    layers: int | None = None
    """Most layers of each bundled model; None: all."""
    buckets: tuple[int, ...] = (1, 4, 64)
    """Row buckets of the bundled models' lanes."""
    prompts: int = 4
    """Prompts of each bundled model on each rung of the ladder."""
    prompt_tokens: int = 40
    new_tokens: int = 24
    steps: int = 100_000
    """Steps of the check "many steps"."""
    shape: str = "Qwen3-30B-A3B"
    """Model of the times; `tiny` in its name: a bundled one."""
    batches: tuple[int, ...] = (1, 4)
    context: int = 1024
    tokens: int = 64
    rounds: int = 10
    chunk_mib: tuple[int, ...] = (2, 16)
    chunks: int = 64
    """Chunks of each size of the mapping costs."""
    tests: tuple[str, ...] = ("test",)
    """Files and folders in which tests marked `gpu` are looked for."""


class CapturedStage(Protocol):
    """What capture makes of a stage."""

    def replay(self) -> None: ...

    def raw_cuda_graph(self) -> int: ...


class Platform(Protocol):
    name: str
    """Name of the GPU; or what there is instead of one."""
    is_gpu: bool
    scale: Scale

    @property
    def device(self) -> torch.device: ...

    @property
    def host(self) -> HostSide:
        """The host's side of the device, for what is captured without a loop."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has done everything."""

    def capture(
        self, lanes: Sequence[LaneBuffers], stages: Mapping[tuple[int, int, int], HasStages]
    ) -> tuple[Mapping[Key, CapturedStage], Refused]:
        """Captures every stage as :func:`crosspool.ranks.gpu.launch.capture` does, its warm-up
        included. They can be replayed once instantiated, see :meth:`instantiate`."""
        ...

    def instantiate(self, graph: CapturedStage) -> None:
        """Instantiates a captured stage for launches from the host."""

    def node_types(self, graph: CapturedStage) -> list[str]:
        """Types of the nodes of a captured stage."""
        ...

    def loop(
        self, models: Sequence[ModelStages], lanes: Sequence[LaneBuffers], buckets: Sequence[int]
    ) -> CudaLoop:
        """Makes a resident loop without graphs, which is not started."""
        ...

    @property
    def join(self) -> Join:
        """What makes loops of lanes, as :func:`crosspool.ranks.gpu.lanes.join_loop` does."""
        ...

    def driver(self) -> CudaDriver: ...


class CudaPlatform:
    """The GPU ``cuda:0``. Raises RuntimeError when PyTorch sees none."""

    is_gpu = True

    def __init__(self) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} sees no GPU")
        torch.cuda.set_device(0)
        self.device = torch.device("cuda", 0)
        self.name = torch.cuda.get_device_name(0)
        self.scale = Scale()

    @functools.cached_property
    def host(self) -> HostSide:
        from crosspool.ranks.gpu.host_side import HostSide

        return HostSide(self.device)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def capture(
        self, lanes: Sequence[LaneBuffers], stages: Mapping[tuple[int, int, int], HasStages]
    ) -> tuple[Mapping[Key, torch.cuda.CUDAGraph], Refused]:
        from crosspool.ranks.gpu.launch import capture

        return capture(lanes, stages, {}, self.host)

    def instantiate(self, graph: CapturedStage) -> None:
        import torch

        assert isinstance(graph, torch.cuda.CUDAGraph)
        graph.instantiate()

    def node_types(self, graph: CapturedStage) -> list[str]:
        from cuda.bindings import runtime

        handle = runtime.cudaGraph_t(init_value=graph.raw_cuda_graph())
        _, _, count = runtime.cudaGraphGetNodes(handle)
        _, nodes, _ = runtime.cudaGraphGetNodes(handle, count)
        kinds = [runtime.cudaGraphNodeGetType(node)[1].name for node in nodes]
        return [kind.removeprefix("cudaGraphNodeType") for kind in kinds]

    def loop(
        self, models: Sequence[ModelStages], lanes: Sequence[LaneBuffers], buckets: Sequence[int]
    ) -> CudaLoop:
        from crosspool.kernels.cuda_loop import CudaLoop
        from crosspool.ranks.gpu.lanes import loop_places

        return CudaLoop(models, loop_places(lanes), buckets)

    @property
    def join(self) -> Join:
        from crosspool.ranks.gpu.lanes import join_loop

        return join_loop

    def driver(self) -> CudaDriver:
        from crosspool.kernels.cuda_driver import CudaBindings

        return CudaBindings(0)
