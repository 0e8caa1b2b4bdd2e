"""Loads the ranks of one device, joins them to their peers, and answers questions about them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import psutil
import torch
from tqdm import tqdm

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer
from crosspool.models.spec import ModelSpec
from crosspool.observability.trace import LaneEvent, LaneTrace
from crosspool.ranks.executor import Executor
from crosspool.ranks.host.attention_rank import AttentionRank, KVRank, ListsTensors
from crosspool.ranks.host.executor import HostLoop
from crosspool.ranks.host.ffn_rank import FFNRank
from crosspool.ranks.kv_memory import Make, V, take_kv_pool
from crosspool.transport.data_path import AttentionLink, FFNLink, LinkCounters, LocalLink
from crosspool.transport.inspection import (
    DeviceCounters,
    DeviceEvents,
    DevicePools,
    InspectWhat,
    LinkCounts,
    RankInfo,
    Report,
    TensorInfo,
)
from crosspool.transport.shared_memory import SharedMemoryTransport
from crosspool.weightpool.checkpoint import Progress
from crosspool.weightpool.placement import Placement, attention_bytes

if TYPE_CHECKING:
    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer

log = logging.getLogger(__name__)


class Counted(Protocol):
    """A link, as far as its counters go."""

    attention_rank: int
    lane: int
    ffn_rank: int

    @property
    def counters(self) -> LinkCounters: ...


class HostsFFN(Protocol):
    """An FFN rank, as far as everyone may know it; ``parts`` by the model's index."""

    rank: int

    @property
    def parts(self) -> Mapping[int, ListsTensors]: ...

    @property
    def links(self) -> Sequence[Counted]: ...


class Traces(Protocol):
    """Lane events: see :class:`~crosspool.observability.trace.LaneTrace`."""

    def start(self) -> None: ...

    def stop(self) -> list[LaneEvent]: ...


@dataclass
class DeviceRanks:
    """The ranks of one device, what drives them, and their links."""

    deployment: Deployment
    executor: Executor
    attention: KVRank[Any, Any] | None
    ffn: HostsFFN | None
    links: Sequence[Sequence[Counted]]
    """Of the attention rank, by lane and FFN rank."""
    transport: SharedMemoryTransport | None
    trace: Traces
    resources: contextlib.ExitStack
    """What is given back in the end."""

    def infos(self) -> list[RankInfo]:
        infos = []
        if self.attention is not None:
            infos.append(
                RankInfo(
                    role="attention",
                    rank=self.attention.rank,
                    weight_bytes=_weight_bytes(self.attention.parts),
                    kv_bytes=self.attention.budget_bytes,
                )
            )
        if self.ffn is not None:
            infos.append(
                RankInfo(
                    role="ffn",
                    rank=self.ffn.rank,
                    weight_bytes=_weight_bytes(self.ffn.parts.values()),
                    kv_bytes=0,
                )
            )
        return infos

    @property
    def device(self) -> str:
        """The device's name."""
        if self.attention is not None:
            return self.deployment.kv_pool_devices[self.attention.rank].name
        assert self.ffn is not None
        return self.deployment.weight_pool_devices[self.ffn.rank].name

    def inspect(self, what: InspectWhat) -> Report:
        """The reply to :class:`~crosspool.transport.messages.Inspect`."""
        match what:
            case "tensors":
                return Report(tensors=list(self.tensors()))
            case "pools":
                return Report(pools=[self.pools()])
            case "counters":
                return Report(counters=[self.counters()])
            case "trace_start":
                self.trace.start()
                return Report(trace_start=[self.device])
            case "trace_stop":
                events = DeviceEvents(device=self.device, events=self.trace.stop())
                return Report(trace_stop=[events])

    def close(self) -> None:
        """Ends the executor and gives memory back; no tensor of it may be touched afterwards."""
        self.resources.close()

    def tensors(self) -> Iterator[TensorInfo]:
        hosted: list[tuple[Literal["attention", "ffn"], int, int, ListsTensors]] = []
        if self.attention is not None:
            for model, attention in enumerate(self.attention.parts):
                hosted.append(("attention", self.attention.rank, model, attention))
        if self.ffn is not None:
            for model, ffn in self.ffn.parts.items():
                hosted.append(("ffn", self.ffn.rank, model, ffn))
        for role, rank, model, part in hosted:
            for listing in part.tensors():
                yield TensorInfo(
                    device=self.device,
                    role=role,
                    rank=rank,
                    model=self.deployment.models[model].name,
                    **asdict(listing),
                )

    def pools(self) -> DevicePools:
        rss = psutil.Process().memory_info().rss
        if self.attention is None:
            return DevicePools(device=self.device, rss_bytes=rss)
        virtualizer = self.attention.virtualizer
        return DevicePools(
            device=self.device,
            mapped_bytes={
                model.name: virtualizer.mapped_bytes(index)
                for index, model in enumerate(self.deployment.models)
            },
            free_bytes=virtualizer.free_bytes,
            budget_bytes=self.attention.budget_bytes,
            rss_bytes=rss,
        )

    def counters(self) -> DeviceCounters:
        attention = self.attention
        return DeviceCounters(
            device=self.device,
            steps=attention.steps if attention else 0,
            requests=attention.requests if attention else 0,
            links=[_counts(link) for lane in self.links for link in lane] if attention else [],
            served=[_counts(link) for link in self.ffn.links] if self.ffn else [],
        )


def _counts(link: Counted) -> LinkCounts:
    return LinkCounts(
        attention_rank=link.attention_rank,
        lane=link.lane,
        ffn_rank=link.ffn_rank,
        **asdict(link.counters),
    )


def _weight_bytes(parts: Iterable[ListsTensors]) -> int:
    return sum(listing.bytes for part in parts for listing in part.tensors())


def load_ranks(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
) -> DeviceRanks:
    """Loads the weights of the device's ranks, takes the KV pool's memory, joins the links.

    ``lanes_fd``: the data path's shared memory, needed when a peer lives on another device.
    Raises ConfigError for a bad checkpoint or a KV pool that the system has no memory for."""
    if deployment.loop == "resident":
        from crosspool.ranks.resident.load import load_resident_ranks

        return load_resident_ranks(deployment, device, specs, placement, lanes_fd)
    trace = LaneTrace()
    resources = contextlib.ExitStack()
    attention = ffn = None
    if device in deployment.kv_pool_devices:
        attention = _attention_rank(deployment, device, specs)
        resources.callback(attention.virtualizer.close)
    if device in deployment.weight_pool_devices:
        ffn = _ffn_rank(deployment, device, specs, placement, trace)
    transport = join(deployment, device, lanes_fd)
    links = _links(deployment, device, transport)
    if ffn is not None:
        ffn.links = _served(deployment, device, transport, links)
    executor = HostLoop(
        attention,
        links,
        ffn,
        ffn_ranks=[deployment.ffn_ranks(model) for model in range(len(specs))],
        doorbell=transport,
        serves_peers=ffn is not None and any(d != device for d in deployment.kv_pool_devices),
        trace=trace,
    )
    return DeviceRanks(deployment, executor, attention, ffn, links, transport, trace, resources)


def join(
    deployment: Deployment, device: Device, lanes_fd: int | None
) -> SharedMemoryTransport | None:
    """The device's ends of the data path; None without one. Takes the descriptor."""
    if lanes_fd is None:
        return None
    transport = SharedMemoryTransport(lanes_fd, deployment, device)
    os.close(lanes_fd)
    return transport


def _links(
    deployment: Deployment, device: Device, transport: SharedMemoryTransport | None
) -> list[list[AttentionLink]]:
    """The attention rank's ends by lane and FFN rank; none without an attention rank."""
    if device not in deployment.kv_pool_devices:
        return []
    rank = deployment.kv_pool_devices.index(device)
    return [
        [
            LocalLink(rank, lane, ffn_rank)
            if peer == device
            else _joined(transport, device).attention_link(lane, ffn_rank)
            for ffn_rank, peer in enumerate(deployment.weight_pool_devices)
        ]
        for lane in range(deployment.lanes)
    ]


def _served(
    deployment: Deployment,
    device: Device,
    transport: SharedMemoryTransport | None,
    own: list[list[AttentionLink]],
) -> list[FFNLink]:
    """The FFN rank's ends of all lanes; ``own``: the links of the same device's attention rank."""
    ffn_rank = deployment.weight_pool_devices.index(device)
    served: list[FFNLink] = []
    for lane in range(deployment.lanes):
        for rank, peer in enumerate(deployment.kv_pool_devices):
            if peer != device:
                served.append(_joined(transport, device).ffn_link(rank, lane))
                continue
            local = own[lane][ffn_rank]
            assert isinstance(local, LocalLink)
            served.append(local)
    return served


def _joined(transport: SharedMemoryTransport | None, device: Device) -> SharedMemoryTransport:
    if transport is None:
        raise RuntimeError(f"device {device.name} has peers on other devices: pass --lanes-fd")
    return transport


def _attention_rank(
    deployment: Deployment, device: Device, specs: Sequence[ModelSpec]
) -> AttentionRank:
    from crosspool.ranks.host.attention import AttentionPart

    rank = deployment.kv_pool_devices.index(device)
    parts = []
    for model, spec in zip(deployment.models, specs, strict=True):
        with loading(device, f"attention part of {model.name}", attention_bytes(spec)) as progress:
            parts.append(AttentionPart(spec, Path(model.path), progress))
    return AttentionRank(rank, specs, parts, *kv_pool(deployment, device, specs))


def kv_pool(
    deployment: Deployment, device: Device, specs: Sequence[ModelSpec]
) -> tuple[MremapVirtualizer, list[torch.Tensor]]:
    """Takes the KV memory of the device's attention rank: the memory, and each model's cache.

    Raises ConfigError when the system has no memory for it."""
    return _kv_pool(deployment, device, specs, MremapVirtualizer)


def gpu_kv_pool(
    deployment: Deployment, device: Device, specs: Sequence[ModelSpec]
) -> tuple[CudaVirtualizer, list[torch.Tensor]]:
    """As :func:`kv_pool`, on a GPU. Whoever keeps a resident loop there sets the virtualizer's
    ``quiesced``.

    Raises ConfigError when the GPU cannot be used or has no memory for it."""
    from crosspool.kernels.cuda_driver import CudaBindings
    from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer

    driver = CudaBindings(device.gpu)
    return _kv_pool(deployment, device, specs, functools.partial(CudaVirtualizer, driver))


def _kv_pool(
    deployment: Deployment, device: Device, specs: Sequence[ModelSpec], make: Make[V]
) -> tuple[V, list[torch.Tensor]]:
    chunks = deployment.kv_pool_bytes // len(deployment.kv_pool_devices) // deployment.chunk_bytes
    budget = chunks * deployment.chunk_bytes
    with loading(device, "KV pool", budget) as progress:
        done = 0

        def advance(now: int, _total: int) -> None:
            nonlocal done
            progress(now - done)
            done = now

        return take_kv_pool(
            make,
            specs,
            budget_bytes=budget,
            chunk_bytes=deployment.chunk_bytes,
            page_size=deployment.page_size,
            progress=advance,
        )


def _ffn_rank(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    trace: LaneTrace,
) -> FFNRank:
    from crosspool.ranks.host.ffn import FFNPart

    rank = deployment.weight_pool_devices.index(device)
    parts = {}
    for index, shard in placement.shards[rank].items():
        model, total = deployment.models[index], placement.weight_bytes[rank][index]
        with loading(device, f"FFN part of {model.name}", total) as progress:
            parts[index] = FFNPart(specs[index], Path(model.path), shard, progress)
    return FFNRank(rank, specs, parts, trace)


@contextlib.contextmanager
def loading(device: Device, what: str, total: int) -> Iterator[Progress]:
    """A progress bar where someone watches, and one line in the log in any case."""
    began = time.monotonic()
    with tqdm(
        total=total,
        desc=f"{device.name}: {what}",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        yield bar.update
    log.info("%s: %d bytes in %.1f s", what, total, time.monotonic() - began)
