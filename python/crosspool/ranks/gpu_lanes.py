"""The lanes of one GPU: their memory, their stages for every model and row bucket, and the loop
that drives them. Needs torch and Triton, and for a resident loop the native library."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from crosspool.config.errors import ConfigError
from crosspool.kernels.cuda_loop import CudaLoop, ModelStages
from crosspool.kernels.cuda_loop import LanePlaces as LoopPlaces
from crosspool.ranks.gpu_launch import EagerLauncher, GraphLauncher, capture
from crosspool.ranks.gpu_loop import DeviceLoop, HostLaunchedLoop, PartWatch
from crosspool.ranks.gpu_stages import GPUModel, LanePlaces, Scratch, Stages, layouts_of

log = logging.getLogger(__name__)


def make_stages(
    models: Sequence[GPUModel],
    buckets: Sequence[int],
    lanes: int,
    sequences: int,
    device: torch.device,
) -> tuple[list[LanePlaces], dict[tuple[int, int, int], Stages]]:
    """Every lane's memory, and its stages by lane, model and bucket; ``sequences``: of a step at
    most."""
    layouts = [layouts_of(model, buckets, sequences) for model in models]
    arena = max(
        Scratch.bytes(model.spec, layout)
        for model, of_model in zip(models, layouts, strict=True)
        for layout in of_model
    )
    places = [LanePlaces(device, buckets[-1], arena) for _ in range(lanes)]
    stages = {
        (lane, index, bucket): Stages(model, layout, place)
        for lane, place in enumerate(places)
        for index, (model, of_model) in enumerate(zip(models, layouts, strict=True))
        for bucket, layout in enumerate(of_model)
    }
    return places, stages


def make_loop(
    models: Sequence[GPUModel],
    lanes: Sequence[LanePlaces],
    stages: dict[tuple[int, int, int], Stages],
    buckets: Sequence[int],
    *,
    resident: bool,
    watch: PartWatch | None = None,
) -> DeviceLoop:
    """The loop over the lanes' stages: resident or host-launched graphs on a GPU, plain calls on
    CPU tensors. Raises ConfigError for a model whose layers it does not drive."""
    try:
        known = [ModelStages(kinds=model.kinds) for model in models]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if lanes[0].device.type != "cuda":
        return HostLaunchedLoop(known, len(lanes), EagerLauncher(lanes, stages), watch)
    graphs = capture(lanes, stages)
    log.info("captured %d graphs", len(graphs))
    if not resident:
        for graph in graphs.values():
            graph.instantiate()
        layers = max(model.spec.layers for model in models)
        return HostLaunchedLoop(known, len(lanes), GraphLauncher(lanes, graphs, layers), watch)
    places = [LoopPlaces(lane.words.data_ptr(), lane.chosen.data_ptr()) for lane in lanes]
    loop = CudaLoop(known, places, buckets)
    for (lane, model, stage, bucket), graph in graphs.items():
        loop.add_graph(lane, model, stage, bucket, graph.raw_cuda_graph())
    loop.start()
    return loop
