"""The lanes of one GPU: their memory, their stages for every model and row bucket, and the loop
that drives them. Needs torch and Triton, and for a resident loop the native library.

The lanes of an attention rank come first. The lanes of an FFN rank that serves other devices
follow, one for every eight links."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from crosspool.config.errors import ConfigError
from crosspool.kernels.cuda_loop import (
    MAX_LINKS,
    CudaLoop,
    CudaLoopError,
    GPUStage,
    LanePlaces,
    LinkMemory,
    ModelStages,
)
from crosspool.models.spec import DTYPE_BYTES, ModelSpec
from crosspool.ranks.gpu.exchange import HostExchange
from crosspool.ranks.gpu.ffn import ServedStages
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.launch import (
    EagerLauncher,
    GraphLauncher,
    Key,
    Refused,
    capture,
    instantiate,
    refusal,
)
from crosspool.ranks.gpu.links import Crossing, LanePayloads, ServedCounts, by_lane
from crosspool.ranks.gpu.loop import DeviceLoop, HostLaunchedLoop
from crosspool.ranks.gpu.model import GPUModel, kinds_of
from crosspool.ranks.gpu.scratch import FFNScratch, LaneBuffers, Scratch
from crosspool.ranks.gpu.stages import HasStages, Stages, layouts_of
from crosspool.ranks.gpu.weights import GPUFFN

if TYPE_CHECKING:
    from crosspool.ranks.gpu.trace import GPUTrace
    from crosspool.transport.device_links import Tail

log = logging.getLogger(__name__)


def make_stages(
    models: Sequence[GPUModel],
    buckets: Sequence[int],
    lanes: int,
    sequences: int,
    device: torch.device,
    *,
    links: Sequence[Sequence[LinkMemory]] = (),
    crossings: Sequence[Crossing] = (),
) -> tuple[list[LaneBuffers], dict[tuple[int, int, int], Stages]]:
    """Makes the lanes of an attention rank. Returns each lane's memory, and stages by lane, model
    and bucket.

    ``sequences``: most sequences of a step; ``links``: links of each lane, ``crossings``: one for
    each model, both empty where nothing leaves the device."""
    layouts = [layouts_of(model, buckets, sequences) for model in models]
    crossings = crossings or [Crossing()] * len(models)
    arena = max(
        Scratch.bytes(model, layout)
        for model, of_model in zip(models, layouts, strict=True)
        for layout in of_model
    )
    places = [
        LaneBuffers(device, buckets[-1], arena, links=links[lane] if links else ())
        for lane in range(lanes)
    ]
    stages = {
        (lane, index, bucket): Stages(model, layout, place, crossings[index])
        for lane, place in enumerate(places)
        for index, (model, of_model) in enumerate(zip(models, layouts, strict=True))
        for bucket, layout in enumerate(of_model)
    }
    return places, stages


def make_serving(
    specs: Sequence[ModelSpec],
    ffns: Mapping[int, GPUFFN],
    buckets: Sequence[int],
    links: Sequence[LinkMemory],
    device: torch.device,
    *,
    counts: ServedCounts,
    first_lane: int,
) -> tuple[list[LaneBuffers], dict[tuple[int, int, int], ServedStages]]:
    """Makes the lanes of an FFN rank that serve ``links`` to other devices. Returns each lane's
    memory, and stages by lane (counted from ``first_lane``), model and bucket.

    ``ffns``: the rank's parts by the model's index; ``counts``: where stages count what came
    through each link."""
    if not links:
        return [], {}
    arena = max(
        FFNScratch.bytes_of_rows(specs[model], ffn.kinds, rows)
        for model, ffn in ffns.items()
        for rows in buckets
    )
    lanes: list[LaneBuffers] = []
    stages: dict[tuple[int, int, int], ServedStages] = {}
    for own, counted in zip(by_lane(links), counts.memory.split(MAX_LINKS), strict=True):
        lane = LaneBuffers(device, buckets[-1], arena, links=own, serves=True)
        payloads = LanePayloads.of(own, device, None)
        for model, ffn in ffns.items():
            for bucket, rows in enumerate(buckets):
                stages[first_lane + len(lanes), model, bucket] = ServedStages(
                    specs[model], ffn, rows, lane, payloads=payloads, served=counted
                )
        lanes.append(lane)
    return lanes, stages


def model_stages(spec: ModelSpec, crossing: Crossing) -> ModelStages:
    """Describes a model to a loop. Raises ConfigError for one whose layers it does not drive."""
    try:
        kinds = kinds_of(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return ModelStages(
        kinds=kinds,
        row_bytes=spec.hidden * DTYPE_BYTES[spec.dtype],
        links=crossing.links,
        local=crossing.own is not None,
    )


def join_loop(
    models: Sequence[ModelStages],
    lanes: Sequence[LaneBuffers],
    stages: Mapping[tuple[int, int, int], HasStages],
    buckets: Sequence[int],
    *,
    host: HostSide,
    resident: bool,
    watch: GPUTrace | None = None,
    exchange: HostExchange | None = None,
    epoch: int = 1,
    tails: Mapping[tuple[int, int, GPUStage], Tail] | None = None,
) -> DeviceLoop:
    """Makes the loop over the lanes' stages: it launches graphs on a GPU, resident or from the
    host, and makes plain calls on CPU tensors. A resident loop is not started here: all that may
    wait for the device comes before.

    ``host``: the host's side of the lanes' device; ``exchange``: for the host-launched loop, where
    rows leave the device; ``epoch``: of a resident loop's dispatches; ``tails``: what ends captured
    stages, by lane, model and stage. Raises CudaLoopError, which names every stage that CUDA
    refuses."""
    own = sum(not lane.serves for lane in lanes)
    if lanes[0].device.type != "cuda":
        return HostLaunchedLoop(models, own, EagerLauncher(lanes, stages), watch, exchange)
    graphs, refused = capture(lanes, stages, tails or {}, host)
    log.info("captured %d graphs for %d lanes", len(graphs), len(lanes))
    if not resident:
        refused |= instantiate(graphs)
        if refused:
            raise CudaLoopError(refusal(refused, buckets))
        layers = max(len(model.kinds) for model in models)
        launcher = GraphLauncher(lanes, graphs, layers, host)
        return HostLaunchedLoop(models, own, launcher, watch, exchange)
    try:
        loop = CudaLoop(models, loop_places(lanes), buckets, epoch=epoch, residency=host.residency)
    except CudaLoopError as error:
        if refused:  # a kernel that faulted leaves a device on which nothing can be made
            raise CudaLoopError(refusal(refused, buckets)) from error
        raise
    refused |= add_graphs(loop, {key: graph.raw_cuda_graph() for key, graph in graphs.items()})
    if refused:
        loop.close()
        raise CudaLoopError(refusal(refused, buckets))
    return loop


def add_graphs(loop: CudaLoop, graphs: Mapping[Key, int]) -> Refused:
    """Gives captured graphs (``cudaGraph_t``) to a resident loop, which instantiates each for
    itself. Returns those that were refused, and goes on with the rest."""
    refused: Refused = {}
    for key, graph in graphs.items():
        try:
            loop.add_graph(*key, graph)
        except CudaLoopError as error:
            refused[key] = str(error)
    return refused


def loop_places(lanes: Sequence[LaneBuffers]) -> list[LanePlaces]:
    """Describes lanes to the resident loop."""
    return [
        LanePlaces(lane.words.data_ptr(), lane.chosen.data_ptr(), lane.links, lane.serves)
        for lane in lanes
    ]
