"""Joins what lies on one GPU to a device that takes steps: lanes, links, a loop, an executor.

Works over any torch device: on CPU tensors, with Triton's interpreter, it makes the same device
without graphs, as the tests do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels.cuda_loop import CudaLoop
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.kvpool.virtualizer import Virtualizer
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import Counted, DeviceRanks, FixedModels, Traces
from crosspool.ranks.gpu.executor import GPUExecutor
from crosspool.ranks.gpu.flight import GPURank
from crosspool.ranks.gpu.host_side import HostSide, start
from crosspool.ranks.gpu.inputs import HostMemory
from crosspool.ranks.gpu.lanes import join_loop, make_serving, make_stages, model_stages
from crosspool.ranks.gpu.links import CountedLink, GPULinks, crossing_of
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.ranks.gpu.stages import HasStages, Stages, buckets_up_to
from crosspool.ranks.gpu.trace import GPUTrace, ResidentGPUTrace
from crosspool.ranks.gpu.weights import GPUFFN
from crosspool.transport.heartbeats import Heartbeat
from crosspool.transport.links import GPUPeers, open_ends


@dataclass(frozen=True)
class GPUParts:
    """Weights and KV cache that lie on one GPU."""

    specs: Sequence[ModelSpec]
    """All models of the deployment, whose numbers count from 0: none comes or goes on GPUs."""
    models: list[GPUModel] = field(default_factory=list)
    """All models, where there is an attention rank; none without."""
    ffns: dict[int, GPUFFN] = field(default_factory=dict)
    """The FFN rank's parts, by the model's index."""


@dataclass
class GPUFFNRank:
    """The FFN rank of a GPU."""

    rank: int
    parts: Mapping[int, GPUFFN]
    links: Sequence[Counted]


def join_lanes(
    deployment: Deployment,
    device: Device,
    parts: GPUParts,
    peers: GPUPeers | None,
    *,
    virtualizer: Virtualizer | None,
    host: HostSide,
    resources: contextlib.ExitStack,
    heartbeat: Heartbeat | None = None,
) -> tuple[DeviceRanks, GPUExecutor]:
    """Makes the device's lanes, and the loop over them, which is closed with ``resources``. A
    resident loop is started last, when nothing is left to allocate or to load.

    ``peers``: the links to other devices, if there are any; ``virtualizer``: the attention rank's;
    ``host``: the host's side of the device on which tensors lie; ``heartbeat``: where the loop
    shows that it goes on. Raises ConfigError for a model
    whose layers a GPU does not drive, CudaLoopError where the loop cannot be made."""
    on = host.device
    buckets, held = buckets_up_to(deployment.max_step_tokens), frozenset(parts.ffns)
    links = GPULinks(deployment, device, peers, host)
    outgoing, served = open_ends(
        deployment, device, local=CountedLink, remote=None if peers is None else links
    )
    models = range(len(parts.specs))
    crossings = [crossing_of(deployment, device, model) for model in models]
    known = [model_stages(*of) for of in zip(parts.specs, crossings, strict=True)]
    lanes: list[LaneBuffers] = []
    stages: dict[tuple[int, int, int], Stages] = {}
    if parts.models:
        lanes, stages = make_stages(
            parts.models,
            buckets,
            deployment.lanes,
            deployment.max_running_requests,
            on,
            links=links.outgoing,
            crossings=crossings,
        )
    serving, served_stages = make_serving(
        parts.specs,
        parts.ffns,
        buckets,
        links.incoming,
        on,
        counts=links.counts,
        first_lane=len(lanes),
    )
    every_lane, epoch = [*lanes, *serving], time.time_ns()
    every_stage: dict[tuple[int, int, int], HasStages] = {**stages, **served_stages}
    own = {"attention_rank": links.attention_rank or 0, "ffn_rank": links.ffn_rank or 0}
    watch = GPUTrace(**own)
    loop = join_loop(
        known,
        every_lane,
        every_stage,
        buckets,
        host=host,
        resident=on.type == "cuda" and deployment.loop == "resident",
        watch=watch,
        exchange=links.host_exchange(held, buckets),
        epoch=epoch,
        tails=links.tails(every_lane, known, held, epoch),
    )
    attention = ffn = None
    if virtualizer is not None:
        assert links.attention_rank is not None
        held_parts, kv = (
            {i: m.attention for i, m in enumerate(parts.models)},
            {i: m.kv for i, m in enumerate(parts.models)},
        )
        specs = dict(enumerate(parts.specs))
        attention = GPURank(links.attention_rank, specs, held_parts, virtualizer, kv)
    if links.ffn_rank is not None:
        ffn = GPUFFNRank(links.ffn_rank, parts.ffns, served)
    ranks = [deployment.ffn_ranks(model) for model in models]
    executor = GPUExecutor(
        attention,
        loop,
        buckets=buckets,
        stages=stages,
        memory=_host_memory(deployment, stages, len(lanes), host),
        counters=[
            [[of_lane[rank].counters for rank in of_model] for of_model in ranks]
            for of_lane in outgoing
        ],
        host=host,
        polls_peers=bool(links.incoming),
        heartbeat=heartbeat,
    )
    resources.callback(executor.close)
    if isinstance(virtualizer, CudaVirtualizer):
        virtualizer.quiesced = executor.quiesced
    trace: Traces = watch
    if isinstance(loop, CudaLoop):
        trace = ResidentGPUTrace(loop, **own, own_lanes=len(lanes), sources=links.sources)
    start(loop, host)
    return DeviceRanks(
        *(deployment, device, executor, attention, ffn, outgoing, trace, resources),
        FixedModels(deployment.models, models),
    ), executor


def _host_memory(
    deployment: Deployment,
    stages: Mapping[tuple[int, int, int], Stages],
    lanes: int,
    host: HostSide,
) -> list[HostMemory]:
    """Makes what each lane of the attention rank shares with the host."""
    elements = max((of_model.layout.elements for of_model in stages.values()), default=0)
    return [
        HostMemory(elements, deployment.max_running_requests, deployment.lease_steps, host)
        for _ in range(lanes)
    ]
