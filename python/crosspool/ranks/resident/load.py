"""Loads the ranks of one device for the resident loop: packed weights, tables, links, the loop."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.config.sizes import format_size
from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Team
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.kv_memory import kv_pool
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.resident.executor import ResidentLoop
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.flight import ResidentRank
from crosspool.ranks.resident.links import ResidentLink, ResidentLinks
from crosspool.ranks.resident.packing import NATIVE_DTYPES
from crosspool.ranks.resident.trace import ResidentTrace
from crosspool.ranks.weights import TORCH_DTYPES, held_models
from crosspool.transport.links import join, open_ends
from crosspool.transport.shared_memory import spin_ns_of
from crosspool.weightpool.placement import Placement


@dataclass
class ResidentFFN:
    """The FFN rank of a device."""

    rank: int
    parts: dict[int, PackedFFN]
    """The models that lie on the rank, by their index."""
    links: Sequence[ResidentLink] = ()


def load_resident_ranks(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
) -> DeviceRanks:
    """As :func:`crosspool.ranks.device_process.load_ranks`, for the resident loop."""
    resources = contextlib.ExitStack()
    team = resources.enter_context(Team(device.cores))
    tables = _tables(deployment, specs)
    attention = ffn = None
    kv: Sequence[Tensor] = ()
    if device in deployment.kv_pool_devices:
        virtualizer, kv = kv_pool(deployment, device, specs)
        resources.callback(virtualizer.close)
    attention_parts: list[PackedAttention] = []
    ffn_parts: dict[int, PackedFFN] = {}
    for held in held_models(deployment, device, specs, placement):
        with held.loading(device) as loaded:
            table, path, weights = tables[held.index], held.path, []
            if held.attention:
                cache = kv[held.index]
                positions = min(held.spec.context, cache.shape[0] * cache.shape[2])
                attention_part = PackedAttention(held.spec, path, team, positions, loaded.progress)
                resources.callback(attention_part.close)
                attention_part.fill(table, cache)
                attention_parts.append(attention_part)
                weights.append(attention_part.weights)
            if held.ffn is not None:
                ffn_part = PackedFFN(held.spec, path, held.ffn, team, loaded.progress)
                resources.callback(ffn_part.close)
                ffn_part.fill(table)
                ffn_parts[held.index] = ffn_part
                weights.append(ffn_part.weights)
            plain = format_size(sum(part.plain_bytes for part in weights))
            compact = format_size(sum(part.held_bytes for part in weights))
            loaded.notes.append(f"matrices of {plain} take {compact}")
    if device in deployment.kv_pool_devices:
        rank = deployment.kv_pool_devices.index(device)
        attention = ResidentRank(rank, specs, attention_parts, virtualizer, kv)
    if device in deployment.weight_pool_devices:
        ffn = ResidentFFN(deployment.weight_pool_devices.index(device), ffn_parts)
    transport = join(deployment, device, lanes_fd)
    attention_rank, ffn_rank = (-1 if rank is None else rank.rank for rank in (attention, ffn))
    remote = None if transport is None else ResidentLinks(transport, attention_rank, ffn_rank)
    local_counters = (es.LinkCounters * deployment.lanes)()
    links, served = open_ends(
        deployment,
        device,
        local=lambda rank, lane, to: ResidentLink(rank, lane, to, local_counters[lane]),
        remote=remote,
    )
    if ffn is not None:
        ffn.links = served
    outgoing = _array([] if remote is None else remote.outgoing)
    incoming = _array([] if remote is None else remote.incoming)
    # The doorbell of a device without peers on others is its own affair; a cache line of its own.
    alone = ctypes.create_string_buffer(128)
    doorbell = -(-ctypes.addressof(alone) // 64) * 64
    description = es.LoopDescription(
        models=tables,
        outgoing=outgoing,
        incoming=incoming,
        local_counters=ctypes.addressof(local_counters) if attention and ffn else None,
        doorbell=doorbell if transport is None else transport.doorbell_address,
        epoch=time.time_ns(),
        spin_ns=spin_ns_of(deployment, device),
        model_count=len(specs),
        outgoing_count=len(outgoing),
        incoming_count=len(incoming),
        lanes=deployment.lanes if attention else 0,
        max_rows=deployment.max_step_tokens,
        attention_rank=attention_rank,
        ffn_rank=ffn_rank,
    )
    # The loop reads them until it is closed, so they are let go of after it.
    resources.callback(lambda: (alone, tables, links, served, transport, description))
    executor = ResidentLoop(attention, team, description)
    resources.callback(executor.close)
    trace = ResidentTrace(executor.loop, attention_rank, ffn_rank)
    return DeviceRanks(deployment, device, executor, attention, ffn, links, trace, resources)


def _tables(deployment: Deployment, specs: Sequence[ModelSpec]) -> ctypes.Array[es.ModelTable]:
    """A table for each model, without its weights."""
    tables = (es.ModelTable * len(specs))()
    for model, (table, spec) in enumerate(zip(tables, specs, strict=True)):
        table.dtype = NATIVE_DTYPES[TORCH_DTYPES[spec.dtype]]
        table.hidden, table.vocab, table.layers = spec.hidden, spec.vocab, spec.layers
        table.norm_eps = spec.norm_eps
        ranks = deployment.ffn_ranks(model)
        table.ffn_ranks = (ctypes.c_int32 * len(ranks))(*ranks)
        table.ffn_rank_count = len(ranks)
    return tables


def _array(links: Sequence[es.LinkDescription]) -> ctypes.Array[es.LinkDescription]:
    return (es.LinkDescription * len(links))(*links)
