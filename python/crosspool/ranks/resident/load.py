"""Loads the ranks of one device for the resident loop: packed weights, tables, links, the loop."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels import engine_structs as es
from crosspool.kernels import native_structs as ns
from crosspool.kernels.engine import Team
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks, join, kv_pool, loading
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.resident.executor import ResidentLink, ResidentLoop
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.flight import ResidentRank
from crosspool.ranks.resident.packing import PackedWeights
from crosspool.ranks.resident.trace import ResidentTrace
from crosspool.transport.lane_layout import LinkPlace
from crosspool.transport.shared_memory import SharedMemoryTransport, spin_ns_of
from crosspool.weightpool.placement import Placement, attention_bytes

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": ns.BFLOAT16, "float32": ns.FLOAT32}


@dataclass
class ResidentFFN:
    """The FFN rank of a device; ``parts`` holds the models that lie on it, by their index."""

    rank: int
    parts: dict[int, PackedFFN]
    links: Sequence[ResidentLink] = ()


@dataclass
class _Links:
    """A device's ends of all lanes, as native code and as the counters see them. Outgoing ones are
    the attention rank's, incoming ones other devices' to the FFN rank."""

    outgoing: list[es.LinkDescription] = field(default_factory=list)
    incoming: list[es.LinkDescription] = field(default_factory=list)
    local_counters: ctypes.Array | None = None
    own: list[list[ResidentLink]] = field(default_factory=list)
    """Of the attention rank, by lane and FFN rank."""
    served: list[ResidentLink] = field(default_factory=list)
    """Of the FFN rank."""


def load_resident_ranks(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
) -> DeviceRanks:
    """As :func:`crosspool.ranks.device.load_ranks`."""
    resources = contextlib.ExitStack()
    team = resources.enter_context(Team(device.cores))
    loading = _Loading(deployment, device, specs, team, resources)
    attention = loading.attention_rank() if device in deployment.kv_pool_devices else None
    ffn = loading.ffn_rank(placement) if device in deployment.weight_pool_devices else None
    transport = join(deployment, device, lanes_fd)
    links = _join_links(deployment, device, transport, attention, ffn)
    if ffn is not None:
        ffn.links = links.served
    # The doorbell of a device without peers on others is its own affair; a cache line of its own.
    alone = ctypes.create_string_buffer(128)
    doorbell = -(-ctypes.addressof(alone) // 64) * 64
    description = es.LoopDescription(
        models=loading.tables,
        outgoing=(es.LinkDescription * len(links.outgoing))(*links.outgoing),
        incoming=(es.LinkDescription * len(links.incoming))(*links.incoming),
        local_counters=links.local_counters and ctypes.addressof(links.local_counters),
        doorbell=doorbell if transport is None else transport.doorbell_address,
        epoch=time.time_ns(),
        spin_ns=spin_ns_of(deployment, device),
        model_count=len(specs),
        outgoing_count=len(links.outgoing),
        incoming_count=len(links.incoming),
        lanes=deployment.lanes if attention else 0,
        max_rows=deployment.max_step_tokens,
        attention_rank=attention.rank if attention else -1,
        ffn_rank=ffn.rank if ffn else -1,
    )
    executor = ResidentLoop(attention, team, description)
    resources.callback(executor.close)
    resources.callback(lambda: (alone, loading, links, description))  # kept until here
    return DeviceRanks(
        deployment=deployment,
        executor=executor,
        attention=attention,
        ffn=ffn,
        links=links.own,
        transport=transport,
        trace=ResidentTrace(executor.loop, description.attention_rank, description.ffn_rank),
        resources=resources,
    )


class _Loading:
    """Fills the models' tables with what lies on the device."""

    def __init__(
        self,
        deployment: Deployment,
        device: Device,
        specs: Sequence[ModelSpec],
        team: Team,
        resources: contextlib.ExitStack,
    ) -> None:
        self._deployment = deployment
        self._device = device
        self._specs = specs
        self._team = team
        self._resources = resources
        self.tables = (es.ModelTable * len(specs))()
        for model, (table, spec) in enumerate(zip(self.tables, specs, strict=True)):
            table.dtype = _DTYPES[spec.dtype]
            table.hidden, table.vocab, table.layers = spec.hidden, spec.vocab, spec.layers
            table.norm_eps = spec.norm_eps
            ranks = deployment.ffn_ranks(model)
            table.ffn_ranks = (ctypes.c_int32 * len(ranks))(*ranks)
            table.ffn_rank_count = len(ranks)

    def attention_rank(self) -> ResidentRank:
        deployment, device, specs = self._deployment, self._device, self._specs
        virtualizer, kv = kv_pool(deployment, device, specs)
        self._resources.callback(virtualizer.close)
        parts = []
        for model, spec, cache, table in zip(
            deployment.models, specs, kv, self.tables, strict=True
        ):
            positions = min(spec.context, cache.shape[0] * cache.shape[2])
            total = attention_bytes(spec)
            what = f"attention part of {model.name}"
            with loading(device, what, total) as progress:
                part = PackedAttention(spec, Path(model.path), self._team, positions, progress)
            _tell(what, part.weights)
            self._resources.callback(part.close)
            part.fill(table, cache)
            parts.append(part)
        rank = deployment.kv_pool_devices.index(device)
        return ResidentRank(rank, specs, parts, virtualizer, kv)

    def ffn_rank(self, placement: Placement) -> ResidentFFN:
        rank = self._deployment.weight_pool_devices.index(self._device)
        parts = {}
        for index, shard in placement.shards[rank].items():
            model, spec = self._deployment.models[index], self._specs[index]
            total = placement.weight_bytes[rank][index]
            what = f"FFN part of {model.name}"
            with loading(self._device, what, total) as progress:
                part = PackedFFN(spec, Path(model.path), shard, self._team, progress)
            _tell(what, part.weights)
            self._resources.callback(part.close)
            part.fill(self.tables[index])
            parts[index] = part
        return ResidentFFN(rank, parts)


def _tell(what: str, weights: PackedWeights) -> None:
    log.info("%s: matrices of %d bytes in %d", what, weights.plain_bytes, weights.held_bytes)


def _join_links(
    deployment: Deployment,
    device: Device,
    transport: SharedMemoryTransport | None,
    attention: ResidentRank | None,
    ffn: ResidentFFN | None,
) -> _Links:
    links = _Links()
    lanes = range(deployment.lanes)
    if attention is not None:
        links.local_counters = (es.NativeLinkCounters * deployment.lanes)() if ffn else None
        for lane in lanes:
            of_lane = []
            for rank, peer in enumerate(deployment.weight_pool_devices):
                if peer == device:
                    assert links.local_counters is not None
                    counters = links.local_counters[lane]
                else:
                    counters = es.NativeLinkCounters()
                    place = _of(transport, device).attention_place(lane, rank)
                    links.outgoing.append(_described(place, counters, attention.rank, lane, rank))
                of_lane.append(ResidentLink(attention.rank, lane, rank, counters))
            links.own.append(of_lane)
    if ffn is not None:
        for lane in lanes:
            for rank, peer in enumerate(deployment.kv_pool_devices):
                if peer == device:
                    links.served.append(links.own[lane][ffn.rank])
                    continue
                counters = es.NativeLinkCounters()
                place = _of(transport, device).ffn_place(rank, lane)
                links.incoming.append(_described(place, counters, rank, lane, ffn.rank))
                links.served.append(ResidentLink(rank, lane, ffn.rank, counters))
    return links


def _described(
    place: LinkPlace, counters: es.NativeLinkCounters, attention_rank: int, lane: int, ffn_rank: int
) -> es.LinkDescription:
    return es.LinkDescription(
        link=place.address,
        payload_bytes=place.payload_bytes,
        max_rows=place.max_rows,
        max_row_bytes=place.max_row_bytes,
        peer=place.peer_doorbell,
        counters=ctypes.addressof(counters),
        attention_rank=attention_rank,
        lane=lane,
        ffn_rank=ffn_rank,
    )


def _of(transport: SharedMemoryTransport | None, device: Device) -> SharedMemoryTransport:
    if transport is None:
        raise RuntimeError(f"device {device.name} has peers on other devices: pass --lanes-fd")
    return transport
