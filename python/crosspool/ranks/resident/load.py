"""Loads the ranks of one device for the resident loop: packed weights, tables, links, the loop."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from crosspool.ranks.kv_memory import cache_tokens, kv_pool
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


@dataclass(frozen=True)
class ResidentWeights:
    """What a device holds of all models, in packed form. Forked processes share it."""

    attention: list[PackedAttention]
    """Every model's, if the device has an attention rank."""
    ffn: dict[int, PackedFFN]
    """The models that lie on the FFN rank, by their index."""

    def close(self) -> None:
        """Gives the memory back, after the loop that reads it was closed."""
        parts: list[PackedAttention | PackedFFN] = [*self.attention, *self.ffn.values()]
        for part in parts:
            part.close()


def load_resident_weights(
    deployment: Deployment, device: Device, specs: Sequence[ModelSpec], placement: Placement
) -> ResidentWeights:
    """Reads the weights of a device, packs those that no earlier process has packed, and has these
    kept. No thread is left.

    Raises ConfigError for a bad checkpoint, and kernels that this machine cannot run."""
    log.info("%d threads with %s kernels", len(device.cores), default_isa())
    weights = ResidentWeights([], {})
    keeper = _keeper(deployment)
    tokens = cache_tokens(deployment, specs)
    with Team(device.cores) as team:
        loading = _Loading(device, team, keeper, weights)
        for held in held_models(deployment, device, specs, placement):
            loading.load(held, min(held.spec.context, tokens[held.index]))
    if keeper is not None:
        keeper.start()
    return weights


def load_resident_ranks(
    deployment: Deployment,
    device: Device,
    specs: Sequence[ModelSpec],
    weights: ResidentWeights,
    lanes_fd: int | None,
) -> DeviceRanks:
    """Loads the ranks of a device for the resident loop; see
    :func:`crosspool.ranks.device_process.load_ranks`."""
    resources = contextlib.ExitStack()
    resources.callback(weights.close)
    team = resources.enter_context(Team(device.cores))
    tables = _tables(deployment, specs)
    kv: Sequence[Tensor] = ()
    if device in deployment.kv_pool_devices:
        virtualizer, kv = kv_pool(deployment, device, specs)
        resources.callback(virtualizer.close)
    for index, attention_part in enumerate(weights.attention):
        attention_part.fill(tables[index], kv[index])
    for index, ffn_part in weights.ffn.items():
        ffn_part.fill(tables[index])
    links = ResidentLinks(deployment, device, lanes_fd)
    attention = ffn = None
    if links.attention_rank >= 0:
        attention = ResidentRank(links.attention_rank, specs, weights.attention, virtualizer, kv)
    if links.ffn_rank >= 0:
        ffn = ResidentFFN(links.ffn_rank, weights.ffn, links.ffn)
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
    trace = ResidentTrace(executor.loop, links.attention_rank, links.ffn_rank)
    return DeviceRanks(
        deployment, device, executor, attention, ffn, links.attention, trace, resources
    )


@dataclass(frozen=True)
class _Loading:
    """Loads models, one after another."""

    device: Device
    team: Team
    keeper: WeightKeeper | None
    weights: ResidentWeights

    def load(self, held: HeldModel, positions: int) -> None:
        """Adds the device's part of a model. ``positions``: tokens of the longest sequence that may
        come."""
        spec, path, team = held.spec, held.path, self.team
        parts: list[PackedAttention | PackedFFN] = []
        with held.loading(self.device) as loaded:
            progress = loaded.progress
            if held.attention:
                kept = self._kept(path, "attention")
                attention = PackedAttention(spec, path, team, positions, progress, kept=kept)
                self.weights.attention.append(attention)
                parts.append(attention)
            if held.ffn is not None:
                kept = self._kept(path, "ffn")
                ffn = PackedFFN(spec, path, held.ffn, team, progress, kept=kept)
                self.weights.ffn[held.index] = ffn
                parts.append(ffn)
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
