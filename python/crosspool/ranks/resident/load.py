"""Loads the ranks of one device for the resident loop: packed weights, tables, links, the loop."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.config.sizes import format_size
from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Team
from crosspool.kernels.isa import default_isa
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.kv_memory import kv_pool
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.resident.executor import ResidentLoop
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.flight import ResidentRank
from crosspool.ranks.resident.kept_weights import KeptWeights, WeightKeeper
from crosspool.ranks.resident.links import ResidentLink, ResidentLinks
from crosspool.ranks.resident.packing import NATIVE_DTYPES
from crosspool.ranks.resident.trace import ResidentTrace
from crosspool.ranks.weights import TORCH_DTYPES, HeldModel, held_models
from crosspool.transport.data_path import spin_ns_of
from crosspool.weightpool.packed_cache import PackedCache, Unusable, default_folder
from crosspool.weightpool.placement import Placement

log = logging.getLogger(__name__)


@dataclass
class ResidentFFN:
    """The FFN rank of a device."""

    rank: int
    parts: dict[int, PackedFFN]
    """The models that lie on the rank, by their index."""
    links: Sequence[ResidentLink]


def load_resident_ranks(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
) -> DeviceRanks:
    """Loads the ranks of a device for the resident loop; see
    :func:`crosspool.ranks.device_process.load_ranks`."""
    log.info("%d threads with %s kernels", len(device.cores), default_isa())
    resources = contextlib.ExitStack()
    team = resources.enter_context(Team(device.cores))
    tables = _tables(deployment, specs)
    kv: Sequence[Tensor] = ()
    if device in deployment.kv_pool_devices:
        virtualizer, kv = kv_pool(deployment, device, specs)
        resources.callback(virtualizer.close)
    keeper = _keeper(deployment)
    packed = _Packing(device, team, tables, kv, resources, keeper)
    for held in held_models(deployment, device, specs, placement):
        packed.load(held)
    links = ResidentLinks(deployment, device, lanes_fd)
    attention = ffn = None
    if links.attention_rank >= 0:
        attention = ResidentRank(links.attention_rank, specs, packed.attention, virtualizer, kv)
    if links.ffn_rank >= 0:
        ffn = ResidentFFN(links.ffn_rank, packed.ffn, links.ffn)
    description = es.LoopDescription(
        models=tables,
        epoch=time.time_ns(),
        spin_ns=spin_ns_of(deployment, device),
        model_count=len(specs),
        lanes=deployment.lanes if attention else 0,
        max_rows=deployment.max_step_tokens,
    )
    links.describe(description)
    # What the loop reads goes after the loop has ended.
    resources.callback(lambda: (tables, links, description))
    executor = ResidentLoop(attention, team, description)
    resources.callback(executor.close)
    if keeper is not None:
        resources.callback(keeper.close)
        keeper.start()
    trace = ResidentTrace(executor.loop, links.attention_rank, links.ffn_rank)
    return DeviceRanks(
        deployment, device, executor, attention, ffn, links.attention, trace, resources
    )


@dataclass
class _Packing:
    """Packs what the device holds, and fills the models' tables with it."""

    device: Device
    team: Team
    tables: ctypes.Array[es.ModelTable]
    kv: Sequence[Tensor]
    """Each model's cache; none without an attention rank."""
    resources: contextlib.ExitStack
    keeper: WeightKeeper | None
    attention: list[PackedAttention] = field(default_factory=list)
    ffn: dict[int, PackedFFN] = field(default_factory=dict)

    def load(self, held: HeldModel) -> None:
        """Loads the device's part of a model."""
        index, spec, path = held.index, held.spec, held.path
        parts: list[PackedAttention | PackedFFN] = []
        with held.loading(self.device) as loaded:
            if held.attention:
                cache = self.kv[index]
                positions = min(spec.context, cache.shape[0] * cache.shape[2])
                kept = self._kept(path, "attention")
                attention = PackedAttention(
                    spec, path, self.team, positions, loaded.progress, kept=kept
                )
                attention.fill(self.tables[index], cache)
                self.attention.append(attention)
                parts.append(attention)
            if held.ffn is not None:
                kept = self._kept(path, "ffn")
                ffn = PackedFFN(spec, path, held.ffn, self.team, loaded.progress, kept=kept)
                ffn.fill(self.tables[index])
                self.ffn[index] = ffn
                parts.append(ffn)
            for part in parts:
                self.resources.callback(part.close)
            plain = format_size(sum(part.weights.plain_bytes for part in parts))
            compact = format_size(sum(part.weights.held_bytes for part in parts))
            if all(part.weights.was_kept for part in parts):
                loaded.notes.append(f"{compact} of packed matrices read")
            else:
                loaded.notes.append(f"{plain} of matrices packed into {compact}")

    def _kept(self, path: Path, role: str) -> KeptWeights | None:
        return None if self.keeper is None else self.keeper.of(f"{path.name}-{role}")


def _keeper(deployment: Deployment) -> WeightKeeper | None:
    """Packed weights that outlive this process; None where none shall be, or can be."""
    if not deployment.packed_cache_bytes:
        return None
    given = deployment.packed_cache_dir
    try:
        folder = default_folder() if given is None else Path(given).expanduser().absolute()
        began_ns = deployment.file.stat().st_mtime_ns
        return WeightKeeper(PackedCache(folder, deployment.packed_cache_bytes, began_ns))
    except Unusable as error:
        log.warning("packed weights are not kept: %s", error)
        return None


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
