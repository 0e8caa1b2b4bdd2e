"""Loads the ranks of one device for the resident loop: packed weights, tables, links, the loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from crosspool.config.deployment import MAX_MODELS, ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.config.sizes import format_size
from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Team
from crosspool.kernels.isa import default_isa
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.kv_memory import kv_pool, positions_of
from crosspool.ranks.resident.executor import ResidentLoop
from crosspool.ranks.resident.experts import ExpertPool
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.flight import ResidentRank
from crosspool.ranks.resident.kept_weights import WeightKeeper
from crosspool.ranks.resident.links import ResidentLink, ResidentLinks
from crosspool.ranks.resident.models import ResidentModels
from crosspool.ranks.resident.packer import packer_command
from crosspool.ranks.resident.packing import NotKept
from crosspool.ranks.resident.reading import pack_missing
from crosspool.ranks.resident.residency import SleepingModels
from crosspool.ranks.resident.tables import model_table
from crosspool.ranks.resident.trace import ResidentTrace
from crosspool.ranks.resident.weights import ResidentWeights, file_name, keeper_of
from crosspool.ranks.weights import HeldModel, held_models
from crosspool.transport.connector import Peers
from crosspool.transport.data_path import spin_ns_of
from crosspool.transport.heartbeats import Heartbeat
from crosspool.weightpool.experts import share_of
from crosspool.weightpool.placement import Placement, initially_resident

log = logging.getLogger(__name__)


@dataclass
class ResidentFFN:
    """The FFN rank of a device."""

    rank: int
    parts: dict[int, PackedFFN]
    """The models that lie on the rank."""
    links: Sequence[ResidentLink]


def load_resident_weights(
    deployment: Deployment, device: Device, specs: Mapping[int, ModelSpec], placement: Placement
) -> ResidentWeights:
    """Reads the weights of the models that are in memory from the start, packs those that no
    earlier process has packed, and has these kept. No thread is left.

    Raises ConfigError for a bad checkpoint, and kernels that this machine cannot run."""
    log.info("%d threads with %s kernels", len(device.cores), default_isa())
    weights = ResidentWeights({}, {}, {})
    keeper = keeper_of(deployment)
    resident = initially_resident(deployment, specs)
    with Team(device.cores) as team:
        loading = _Loading(deployment, device, team, keeper, weights)
        for held in held_models(deployment, device, specs, placement):
            weights.declare(held, positions_of(deployment, held.spec), keeper)
            if held.index in resident:
                loading.load(held)
    if keeper is not None:
        keeper.start()
    return weights


def load_resident_ranks(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    weights: ResidentWeights,
    *,
    lanes_fd: int | None,
    peers: Peers | None = None,
    heartbeat: Heartbeat | None = None,
    elsewhere: Collection[int] = (),
) -> DeviceRanks:
    """Loads the ranks of a device for the resident loop; see
    :func:`crosspool.ranks.device_process.load_ranks`. ``weights`` may be of the models that there
    were earlier: those that have come since are asleep, and those that have left are forgotten, as
    are those whose checkpoints have gone since. ``elsewhere``: cores for threads that do not
    compute; without any they have the device's."""
    specs, keeper = dict(specs), keeper_of(deployment)
    for model in weights.models - specs.keys():
        weights.forget(model)
        if weights.holder is not None:
            weights.holder.give_up(model)
    for held in held_models(deployment, device, specs, placement):
        if held.index not in weights.models:
            try:
                weights.declare(held, positions_of(deployment, held.spec), keeper)
            except ConfigError as error:
                log.error("%s cannot be served any more: %s", held.what, error)
                weights.forget(held.index)
                del specs[held.index]
    deployment = msgspec.structs.replace(
        deployment, models={model: deployment.models[model] for model in specs}
    )
    resources = contextlib.ExitStack()
    resources.callback(weights.close)
    pool = _expert_pool(deployment, device, weights, elsewhere)
    if pool is not None:
        resources.callback(pool.close)
    team = resources.enter_context(Team(device.cores))
    kv: dict[int, Tensor] = {}
    if device in deployment.kv_pool_devices:
        virtualizer, kv = kv_pool(deployment, device, specs)
        resources.callback(virtualizer.close)
    tables = {
        model: model_table(model, spec, deployment.ffn_ranks(model), weights, kv.get(model))
        for model, spec in specs.items()
    }
    links = ResidentLinks(deployment, device, lanes_fd, peers, resources)
    attention = ffn = None
    if links.attention_rank >= 0:
        attention = ResidentRank(links.attention_rank, specs, weights.attention, virtualizer, kv)
    if links.ffn_rank >= 0:
        ffn = ResidentFFN(links.ffn_rank, weights.ffn, links.ffn)
    description = es.LoopDescription(
        models=(es.ModelTable * len(tables))(*tables.values()),
        heartbeat=None if heartbeat is None else heartbeat.loop_address,
        experts=None if pool is None else pool.address,
        epoch=time.time_ns(),
        spin_ns=spin_ns_of(deployment, device),
        model_count=len(tables),
        model_places=MAX_MODELS,
        lanes=deployment.lanes if attention else 0,
        max_rows=deployment.max_step_tokens,
    )
    links.describe(description)
    # What the loop reads goes after the loop has ended.
    resources.callback(lambda: (tables, links, description, heartbeat))
    executor = ResidentLoop(attention, team, description)
    resources.callback(executor.close)

    def packer(model: int, keys: Sequence[str]) -> list[str]:
        return packer_command(deployment, device, model, models.configs[model], keys)

    sleeping = SleepingModels(
        {model: (weights.parts(model), weights.sleeping.get(model)) for model in weights.models},
        executor.loop,
        executor.descriptor,
        packer,
        (lambda model: None) if weights.holder is None else weights.holder.give_up,
        pool=pool,
    )
    models = ResidentModels(
        *(deployment, device, weights),
        tables=tables,
        sleeping=sleeping,
        executor=executor,
        attention=attention,
        keeper=keeper,
        row_room=links.max_row_bytes,
    )
    resources.callback(models.close)
    trace = ResidentTrace(executor.loop, links.attention_rank, links.ffn_rank)
    return DeviceRanks(
        *(deployment, device, executor, attention, ffn, links.attention, trace, resources),
        models,
        pool,
    )


@dataclass(frozen=True)
class _Loading:
    """Loads models, one after another."""

    deployment: Deployment
    device: Device
    team: Team
    keeper: WeightKeeper | None
    weights: ResidentWeights

    def load(self, held: HeldModel) -> None:
        """Loads the device's part of a model."""
        parts = self.weights.parts(held.index)
        if held.experts_on_demand:
            self._pack(held)
        with held.loading(self.device) as loaded:
            for part in parts:
                kept = None if self.keeper is None else self.keeper.of(file_name(held.path, part))
                try:
                    part.load(self.team, loaded.progress, kept)
                except NotKept:  # its file was damaged, and is gone now
                    self._pack(held)
                    part.load(self.team, loaded.progress, kept)
            plain = format_size(sum(part.weights.plain_bytes for part in parts))
            compact = format_size(sum(part.weights.held_bytes for part in parts))
            if all(part.weights.was_kept for part in parts):
                loaded.notes.append(f"{compact} of packed matrices read")
            else:
                loaded.notes.append(f"{plain} of matrices packed into {compact}")

    def _pack(self, held: HeldModel) -> None:
        """Has the model packed by another process, if it is not yet: its experts have no room in
        this one. Raises ConfigError."""
        if held.index not in self.weights.sleeping:
            raise ConfigError(
                f"experts: those of {held.path.name} are read from packed weights, which are not "
                "kept: give a packed_cache_dir that can be written to"
            )
        if not all(one.kept.touch(one.key) for one in self.weights.sleeping[held.index]):
            log.info("%s: packed first, by a process of its own", held.what)
        sleeping = self.weights.sleeping[held.index]
        keys = [one.key for one in sleeping]
        config = self.deployment.models[held.index]
        pack_missing(
            sleeping, packer_command(self.deployment, self.device, held.index, config, keys)
        )


def _expert_pool(
    deployment: Deployment, device: Device, weights: ResidentWeights, elsewhere: Collection[int]
) -> ExpertPool | None:
    """Returns the device's memory for routed experts on demand, with those of the models that are
    in memory; None where it has none. A model whose packed weights have gone since sleeps. Raises
    ConfigError, OSError."""
    share = share_of(deployment)
    if not share or device not in deployment.weight_pool_devices:
        return None
    pool = ExpertPool(share, elsewhere or device.cores)
    try:
        for model, part in weights.ffn.items():
            if not part.on_demand or not part.weights.arena.taken:
                continue
            kept = next(one for one in weights.sleeping[model] if one.part is part)
            opened = kept.kept.open(kept.key, part.weights.image())
            if opened is None:
                log.warning("the packed weights of model %d are gone, and so it sleeps", model)
                weights.drop(model)
                if weights.holder is not None:
                    weights.holder.give_up(model)
                continue
            with opened:
                pool.add(model, part, opened)
    except BaseException:
        pool.close()
        raise
    return pool
