"""Loads the ranks of one GPU: weights, KV pool, stages, graphs, and the loop that drives them.

:func:`join_lanes` puts stages and a loop together over any torch device; on CPU tensors, with
Triton's interpreter, it makes the same device without graphs, as the tests do.
Nothing here has run on a GPU yet (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.gpu import check_alike
from crosspool.kernels.cuda_driver import CudaBindings
from crosspool.kernels.cuda_loop import MAX_LINKS, CudaLoop, LinkMemory, Stage
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.kvpool.virtualizer import Virtualizer
from crosspool.models.spec import ModelSpec, MoEFFN
from crosspool.observability.progress import loading
from crosspool.ranks.device import Counted, DeviceRanks
from crosspool.ranks.gpu.executor import GPUExecutor
from crosspool.ranks.gpu.ffn_executor import GPUFFNExecutor
from crosspool.ranks.gpu.flight import GPURank
from crosspool.ranks.gpu.inputs import HostMemory
from crosspool.ranks.gpu.lanes import Serving, join_loop, make_serving, make_stages, model_stages
from crosspool.ranks.gpu.links import (
    CountedLink,
    Crossing,
    ServedLink,
    crossing_of,
    memory_of,
    remote_ffn_ranks,
)
from crosspool.ranks.gpu.loop import DeviceLoop, HostExchange
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.nvshmem import Tail
from crosspool.ranks.gpu.peers import Peers, meet
from crosspool.ranks.gpu.scratch import LanePlaces
from crosspool.ranks.gpu.stages import HasStages, Stages, buckets_up_to
from crosspool.ranks.gpu.trace import GPUTrace, ResidentGPUTrace
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.ranks.kv_memory import kv_pool_by
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.device_links import DeviceLinks
from crosspool.weightpool.placement import FFNShard, Placement, attention_bytes

_COLUMNS = 16
"""Widths of gated MLPs are multiples of it, as the kernels take them."""


@dataclass
class GPUFFNRank:
    """The FFN rank of a GPU; ``parts`` by the model's index."""

    rank: int
    parts: dict[int, GPUFFN]
    links: Sequence[Counted]


def gpu_kv_pool(
    deployment: Deployment, device: Device, specs: Sequence[ModelSpec]
) -> tuple[CudaVirtualizer, list[torch.Tensor]]:
    """Takes the KV memory of the attention rank on a GPU, as
    :func:`~crosspool.ranks.kv_memory.take_kv_pool` does. The owner of a resident loop on the GPU
    sets the virtualizer's ``quiesced``.

    Raises ConfigError when the GPU cannot be used or has no memory for it."""
    driver = CudaBindings(device.gpu)
    return kv_pool_by(functools.partial(CudaVirtualizer, driver), deployment, device, specs)


@dataclass(frozen=True)
class Held:
    """What lies on one GPU."""

    specs: Sequence[ModelSpec]
    """Of the deployment's models."""
    models: list[GPUModel] = field(default_factory=list)
    """All of them, with an attention rank; none without."""
    ffns: dict[int, GPUFFN] = field(default_factory=dict)
    """With an FFN rank, its parts, by model."""


def load_gpu_ranks(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
) -> DeviceRanks:
    """As :func:`crosspool.ranks.device_process.load_ranks`. The processes of all GPUs of a
    deployment call it at once: they meet, to share the memory of their links."""
    check_alike(deployment.devices)
    torch.cuda.set_device(device.gpu)
    gpu = torch.device("cuda", device.gpu)
    with contextlib.ExitStack() as resources:
        peers = meet(
            deployment,
            device,
            specs,
            lanes_fd,
            driver=CudaBindings(device.gpu),
            resources=resources,
        )
        kv: Sequence[torch.Tensor] = ()
        virtualizer: CudaVirtualizer | None = None
        if device in deployment.kv_pool_devices:
            virtualizer, kv = gpu_kv_pool(deployment, device, specs)
            resources.callback(virtualizer.close)
        held = load_parts(deployment, device, specs, placement, kv, on=gpu)
        made = resources.enter_context(contextlib.ExitStack())
        ranks, executor = join_lanes(
            deployment, device, held, peers, virtualizer=virtualizer, on=gpu, resources=made
        )
        if virtualizer is not None:
            virtualizer.quiesced = executor.quiesced
        ranks.resources = resources.pop_all()
    return ranks


def load_parts(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    caches: Sequence[torch.Tensor],
    *,
    on: torch.device,
) -> Held:
    """Weights of the device's ranks, beside the models' KV ``caches`` (none without an attention
    rank). Raises ConfigError for a bad checkpoint, or a share that the kernels do not take."""
    held = Held(specs)
    if device in deployment.weight_pool_devices:
        rank = deployment.weight_pool_devices.index(device)
        for index, shard in placement.shards[rank].items():
            model, spec = deployment.models[index], specs[index]
            check_share(model, spec, shard)
            total = placement.weight_bytes[rank][index]
            with loading(device.name, f"FFN part of {model.name}", total) as loaded:
                held.ffns[index] = GPUFFN(spec, Path(model.path), shard, on, loaded.progress)
    for index, kv in enumerate(caches):
        model, spec = deployment.models[index], specs[index]
        path, positions = Path(model.path), min(spec.context, kv.shape[0] * kv.shape[2])
        what = f"attention part of {model.name}"
        with loading(device.name, what, attention_bytes(spec)) as loaded:
            attention = GPUAttention(spec, path, on, positions, loaded.progress)
        held.models.append(GPUModel(spec, attention, held.ffns.get(index), kv))
    return held


def check_share(model: ModelConfig, spec: ModelSpec, shard: FFNShard) -> None:
    """Raises ConfigError for a share of gated MLPs that the kernels do not take."""
    for ffn in dict.fromkeys(spec.ffn):
        shared = [ffn.intermediate] if not isinstance(ffn, MoEFFN) else [ffn.shared_intermediate]
        if isinstance(ffn, MoEFFN):
            if shard.parallel == "tp":
                shared.append(ffn.intermediate)
            elif not shard.experts(ffn):
                raise ConfigError(
                    f"{model.name}: {ffn.experts} experts cannot be dealt to {shard.ranks} GPUs"
                )
        for columns in shared:
            share = shard.width(columns)
            if share % _COLUMNS or (columns and not share):
                raise ConfigError(
                    f"{model.name}: gated MLPs of {columns} columns cannot be split between "
                    f"{shard.ranks} GPUs: shares must be multiples of {_COLUMNS} columns; name "
                    "fewer in the model's weight_pool_devices"
                )


def join_lanes(
    deployment: Deployment,
    device: Device,
    held: Held,
    peers: Peers | None,
    *,
    virtualizer: Virtualizer | None,
    on: torch.device,
    resources: contextlib.ExitStack,
) -> tuple[DeviceRanks, GPUExecutor | GPUFFNExecutor]:
    """Stages and memory of every lane, and the loop over them, which is closed with ``resources``.
    ``virtualizer``: of an attention rank's KV pool; ``peers``: where ranks lie on other devices.

    Raises ConfigError for a model whose layers a GPU does not drive."""
    join = _Joining(deployment, device, held, peers, on)
    executor: GPUExecutor | GPUFFNExecutor
    attention: GPURank | None = None
    loop = join.loop()
    trace = join.trace_of(loop)
    if join.attention_rank is None:
        executor = GPUFFNExecutor(loop)
    else:
        assert virtualizer is not None
        parts, kv = [m.attention for m in held.models], [m.kv for m in held.models]
        attention = GPURank(join.attention_rank, held.specs, parts, virtualizer, kv)
        executor = GPUExecutor(
            attention,
            loop,
            buckets=join.buckets,
            stages=join.stages,
            memory=join.host_memory(),
            counters=join.counters(),
            pinned=on.type == "cuda",
            serves_peers=bool(join.incoming),
        )
    resources.callback(executor.close)
    ffn = None
    if join.ffn_rank is not None:
        ffn = GPUFFNRank(join.ffn_rank, held.ffns, join.served())
    ranks = DeviceRanks(
        deployment=deployment,
        device=device,
        executor=executor,
        attention=attention,
        ffn=ffn,
        links=join.links,
        trace=trace,
        resources=resources,
    )
    return ranks, executor


class _Joining:
    """The lanes of one device, and their links."""

    def __init__(
        self,
        deployment: Deployment,
        device: Device,
        held: Held,
        peers: Peers | None,
        on: torch.device,
    ) -> None:
        self._deployment, self._peers, self._on = deployment, peers, on
        specs = self._specs = held.specs
        self._held = held
        kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
        self.attention_rank = kv_pool.index(device) if device in kv_pool else None
        self.ffn_rank = weight_pool.index(device) if device in weight_pool else None
        self.buckets = buckets_up_to(deployment.max_step_tokens)
        self._remote = remote_ffn_ranks(deployment, device)
        self._lanes = range(deployment.lanes if self.attention_rank is not None else 0)
        self.incoming = [
            (rank, lane)
            for rank, other in enumerate(kv_pool)
            for lane in range(deployment.lanes)
            if self.ffn_rank is not None and other != device
        ]
        """Attention rank and lane of every link from another device."""
        self._crossings = [Crossing()] * len(specs)
        self._places: list[LanePlaces] = []
        self.stages: dict[tuple[int, int, int], Stages] = {}
        if self.attention_rank is not None:
            self._crossings = [crossing_of(deployment, device, m) for m in range(len(specs))]
            self._places, self.stages = make_stages(
                held.models,
                self.buckets,
                deployment.lanes,
                deployment.max_running_requests,
                on,
                links=[self._outgoing(lane) for lane in self._lanes],
                crossings=self._crossings,
            )
        self._serving: Serving | None = None
        if self.incoming:
            links = [memory_of(self._links.ffn_place(*link)) for link in self.incoming]
            self._serving = make_serving(specs, held.ffns, self.buckets, links, on)
        self.links = [
            [
                CountedLink(self.attention_rank or 0, lane, rank, LinkCounters())
                for rank in range(len(weight_pool))
            ]
            for lane in self._lanes
        ]
        """Of the attention rank, by lane and FFN rank."""
        self._resident = on.type == "cuda" and deployment.loop == "resident"
        self._watch = GPUTrace(attention_rank=self.attention_rank or 0, ffn_rank=self.ffn_rank or 0)

    @property
    def _links(self) -> DeviceLinks:
        assert self._peers is not None
        return self._peers.links

    def _outgoing(self, lane: int) -> list[LinkMemory]:
        return [memory_of(self._links.attention_place(lane, rank)) for rank in self._remote]

    def loop(self) -> DeviceLoop:
        serving, epoch = self._serving or Serving(), time.time_ns()
        first = len(self._places)
        stages: dict[tuple[int, int, int], HasStages] = dict(self.stages)
        for (lane, model, bucket), of_model in serving.stages.items():
            stages[first + lane, model, bucket] = of_model
        return join_loop(
            [model_stages(*of) for of in zip(self._specs, self._crossings, strict=True)],
            [*self._places, *serving.places],
            stages,
            self.buckets,
            resident=self._resident,
            watch=self._watch,
            exchange=self._host_exchange(),
            epoch=epoch,
            tails=self._tails(epoch),
        )

    def _tails(self, epoch: int) -> dict[tuple[int, int, Stage], Tail]:
        """What carries payloads where peers have copies of the links."""
        carrier = None if self._peers is None else self._peers.carrier
        tails: dict[tuple[int, int, Stage], Tail] = {}
        if carrier is None:
            return tails
        for lane, place in enumerate(self._places):
            for model, crossing in enumerate(self._crossings):
                if crossing.links:
                    ranks = [self._remote[link] for link in crossing.links]
                    size = model_stages(self._specs[model], crossing).row_bytes
                    tails[lane, model, Stage.DISPATCH] = carrier.dispatch(
                        place, lane, ranks, epoch=epoch, model=model, row_bytes=size
                    )
        for lane, place in enumerate(self._serving.places if self._serving is not None else ()):
            own = self.incoming[lane * MAX_LINKS : (lane + 1) * MAX_LINKS]
            answer = carrier.answer(place, own)
            for model in self._held.ffns:
                for stage in (Stage.DENSE_FFN, Stage.MOE_FFN):
                    tails[len(self._places) + lane, model, stage] = answer
        return tails

    def _host_exchange(self) -> HostExchange | None:
        transport = None if self._peers is None else self._peers.transport
        if transport is None:
            return None
        served = [transport.ffn_link(*link) for link in self.incoming]
        return HostExchange(
            doorbell=transport,
            outgoing=[
                [transport.attention_link(lane, rank) for rank in self._remote]
                for lane in self._lanes
            ],
            served=[served[i : i + MAX_LINKS] for i in range(0, len(served), MAX_LINKS)],
            held=frozenset(self._held.ffns),
            bucket_rows=self.buckets,
        )

    def trace_of(self, loop: DeviceLoop) -> GPUTrace | ResidentGPUTrace:
        """What records the parts that ``loop`` drives."""
        if not isinstance(loop, CudaLoop):
            return self._watch
        return ResidentGPUTrace(
            loop,
            attention_rank=self.attention_rank or 0,
            ffn_rank=self.ffn_rank or 0,
            own_lanes=len(self._lanes),
            incoming=self.incoming,
        )

    def host_memory(self) -> list[HostMemory]:
        """By lane."""
        deployment = self._deployment
        elements = max(of_model.layout.elements for of_model in self.stages.values())
        return [
            HostMemory(
                elements,
                deployment.max_running_requests,
                deployment.lease_steps,
                pinned=self._on.type == "cuda",
            )
            for _ in self._lanes
        ]

    def counters(self) -> list[list[list[LinkCounters]]]:
        """Of the links to each model's FFN ranks, by lane and model."""
        ranks = [self._deployment.ffn_ranks(model) for model in range(len(self._specs))]
        return [
            [[of_lane[rank].counters for rank in of_model] for of_model in ranks]
            for of_lane in self.links
        ]

    def served(self) -> list[Counted]:
        """Of the FFN rank, by lane and attention rank."""
        found: list[Counted] = []
        assert self.ffn_rank is not None
        for lane in range(self._deployment.lanes):
            for rank in range(len(self._deployment.kv_pool_devices)):
                if (rank, lane) in self.incoming:
                    assert self._serving is not None and self._serving.counts is not None
                    link = self.incoming.index((rank, lane))
                    counts = self._serving.counts
                    found.append(ServedLink(rank, lane, self.ffn_rank, counts, link))
                else:
                    found.append(self.links[lane][self.ffn_rank])
        return found
