"""Makes a plan: the devices of each pool, the page budget, and the placement of every model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size
from crosspool.planner.compare import (
    Requirements,
    SystemPlan,
    kv_model,
    longest_in,
    pooled,
    static_partition,
)
from crosspool.planner.demand.budget import Budget, kv_budget
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.demand.monte_carlo import DemandSamples, monte_carlo
from crosspool.planner.demand.peaks import peak_report
from crosspool.planner.demand.replay import ReplayDemand, replay
from crosspool.planner.devices.groups import FFNLoad, everywhere, group
from crosspool.planner.devices.parallelism import parallelism, served
from crosspool.planner.devices.systems import System, crosspool
from crosspool.planner.monolithic import shared_monolithic
from crosspool.planner.network import NetworkPlan, network_plan
from crosspool.planner.request import PlanRequest
from crosspool.planner.residency import residency_plan
from crosspool.planner.result import ModelPlan, Plan, Saved

_CURVE_POINTS = 200


def make_plan(request: PlanRequest) -> Plan:
    """Makes the plan. Raises ConfigError for input that cannot be planned, and says what would be
    right."""
    shapes = [model.shape for model in request.models]
    shared, kv_devices, weight_devices, weight_needed = _split(request)
    beside = request.pooled_ffn_bytes if shared else 0
    system = crosspool(shapes, kv_devices, request.devices, beside)
    _check_room(request, system, shared)
    longest = [longest_in(request, index, system.free[0]) for index in range(len(shapes))]
    contexts = tuple(_context(request, index, most) for index, most in enumerate(longest))
    kv_models = [kv_model(request, index, context) for index, context in enumerate(contexts)]
    sampled = monte_carlo(
        request.traffic,
        kv_models,
        request.samples,
        request.seed,
        request.charge,
        chunk_bytes=request.chunk_bytes,
        window=request.window,
        progress=request.progress,
    )
    replayed = _replay(request, kv_models)
    demand = _larger(sampled, replayed, request.quantile)
    budget = kv_budget(demand, kv_models, request.quantile, kv_devices, request.level)
    alone = crosspool(shapes, 1, request.devices).free[0]
    kv_needed = max(1, math.ceil(budget.demand.value / alone))
    one = shared and budget.demand.value <= system.free[0]
    wanted = Requirements(
        contexts=contexts,
        own_bytes=tuple(model.own_bytes for model in budget.models),
        pool_bytes=int(budget.demand.value),
    )
    needed = 1 if one else kv_needed + weight_needed
    systems = (
        static_partition(request, wanted),
        shared_monolithic(request, wanted),
        pooled(request, system, (tuple(range(kv_devices)),) * len(shapes), needed),
    )
    if request.models_sleep:
        groups = everywhere(_ffn_loads(request), weight_devices, request.pooled_ffn_bytes)
    else:
        groups = group(_ffn_loads(request), weight_devices, request.devices.usable_for_weights)
    return Plan(
        devices=request.devices,
        shared_device=shared,
        kv_devices=kv_devices,
        kv_devices_needed=kv_needed,
        weight_devices=weight_devices,
        weight_devices_needed=weight_needed,
        quantile=request.quantile,
        charge=request.charge,
        arrivals=(
            "Poisson at constant rates"
            if request.window is None
            else f"Poisson at rates that are constant for {request.window:g} s each"
        ),
        rate=sum(model.rate for model in request.traffic.models),
        budget=budget,
        kv_bytes=sum(system.free),
        exceeds=demand.exceeds(sum(system.free)),
        sampled=sampled.quantile(request.quantile, request.level),
        replayed=None if replayed is None else replayed.quantile(request.quantile),
        models=tuple(
            ModelPlan(
                name=model.name,
                shape=model.shape.id,
                rate=request.traffic.models[index].rate,
                kv_bytes_per_token=model.shape.kv_bytes_per_token,
                state_bytes=model.shape.state_bytes,
                attention_bytes=model.shape.attention_bytes,
                ffn_bytes=model.shape.ffn_bytes,
                context=contexts[index],
                longest=longest[index],
                own_bytes=budget.models[index].own_bytes,
                served=served(kv_devices),
                paper=parallelism(model.shape.attention, model.shape.kv_heads, kv_devices),
                weight_devices=groups.devices[index],
            )
            for index, model in enumerate(request.models)
        ),
        groups=groups,
        residency=residency_plan(request, kv_devices, weight_devices, shared=shared),
        network=_network(request, kv_devices, [len(ranks) for ranks in groups.devices]),
        systems=systems,
        saved=_saved(budget, systems),
        peaks=(
            peak_report(replayed, request.quantile, budget.pool_bytes)
            if request.peaks and replayed is not None
            else None
        ),
        notes=request.notes + _notes(budget, system, systems[2], demand is replayed),
        curve=_curve(sampled, replayed),
        curve_over_time=replayed is not None,
    )


def _split(request: PlanRequest) -> tuple[bool, int, int, int]:
    """Returns whether the pools share one device, the numbers of KV pool and of weight pool
    devices, and the number that the weight pool needs."""
    devices = request.devices
    ffn = request.pooled_ffn_bytes
    room = devices.usable_for_weights
    if room < 1:
        raise ConfigError("weight device reserve: it leaves no room for FFN weights; lower it")
    needed = -(-ffn // room)
    if devices.count == 1:
        return True, 1, 1, 1
    kv, weight = request.kv_pool_devices, request.weight_pool_devices
    if weight is None:
        weight = needed if kv is None else devices.count - kv
    if kv is None:
        kv = devices.count - weight
    if weight < needed or kv < 1 or kv + weight > devices.count:
        given = request.kv_pool_devices or 1
        raise ConfigError(
            f"devices {devices.count}: the weight pool takes {format_size(ffn)}, so it needs "
            f"{needed} device(s) with room for {format_size(room)} each, and the KV pool needs "
            f"{given}: give at least {needed + given}, larger devices, or fewer models"
            + (
                ""
                if request.kv_pool_devices is None and request.weight_pool_devices is None
                else f" (asked for: {request.kv_pool_devices or 'any number of'} KV pool and "
                f"{request.weight_pool_devices or 'any number of'} weight pool devices)"
            )
        )
    return False, kv, weight, needed


def _check_room(request: PlanRequest, system: System, shared: bool) -> None:
    if system.free[0] >= request.chunk_bytes:
        return
    attention = sum(model.shape.attention_bytes for model in request.models)
    ffn = request.pooled_ffn_bytes
    held = f"attention weights of all models ({format_size(attention)})"
    if shared:
        held += f" and, as both pools share it, the FFN weights ({format_size(ffn)})"
    raise ConfigError(
        f"devices of {format_size(request.devices.bytes)}: a KV pool device has "
        f"{format_size(request.devices.usable)} for weights and KV cache, and must hold the "
        f"{held}: no KV memory is left. Give larger devices or fewer models"
    )


def _context(request: PlanRequest, index: int, longest: int) -> int:
    model = request.models[index]
    if model.context is None:
        if longest < 2:
            raise ConfigError(
                f"devices of {format_size(request.devices.bytes)}: the KV memory that weights "
                f"leave on a device is too small for one page of {model.name}; give larger devices"
            )
        return longest
    if model.context < 2:
        raise ConfigError(f"context {model.context} of {model.name}: must be at least 2 tokens")
    if model.context > model.shape.context:
        raise ConfigError(
            f"context {model.context} of {model.name}: the model's own is {model.shape.context}"
        )
    if model.context > longest:
        raise ConfigError(
            f"context {model.context} of {model.name} cannot fit: a request lives on one KV pool "
            f"device, which has room for {longest} of its tokens. Ask for a shorter context, or "
            "give larger devices or fewer models"
        )
    return model.context


def _ffn_loads(request: PlanRequest) -> list[FFNLoad]:
    found = []
    for model, traffic in zip(request.models, request.traffic.models, strict=True):
        output = float(traffic.samples.output.mean()) if traffic.rate > 0 else 0.0
        active = model.shape.active_ffn_bytes_per_token
        found.append(
            FFNLoad(
                name=model.name,
                bytes=model.shape.ffn_bytes,
                load=traffic.rate * output * active,
                layer_bytes=active / model.shape.layers,
            )
        )
    return found


def _network(
    request: PlanRequest, kv_devices: int, ranks: Sequence[int]
) -> tuple[NetworkPlan, ...]:
    if request.network is None:
        return ()
    found = []
    for model, traffic, count in zip(request.models, request.traffic.models, ranks, strict=True):
        if traffic.rate == 0:
            continue
        service = float(traffic.samples.service.mean())
        output = float(traffic.samples.output.mean())
        found.append(
            network_plan(
                model.name,
                model.shape,
                request.network,
                rows=max(1, math.ceil(traffic.rate * service / kv_devices)),
                ranks=count,
                lanes=request.lanes,
                tbt_s=service / output,
                fits_one=model.shape.ffn_bytes <= request.devices.usable_for_weights,
            )
        )
    return tuple(found)


def _replay(request: PlanRequest, kv_models: list[KVModel]) -> ReplayDemand | None:
    if any(model.arrivals is None for model in request.traffic.models):
        return None
    return replay(
        request.traffic,
        kv_models,
        request.charge,
        chunk_bytes=request.chunk_bytes,
        progress=request.progress,
    )


def _saved(budget: Budget, systems: tuple[SystemPlan, ...]) -> Saved:
    static, mono, ours = (system.devices_needed for system in systems)
    return Saved(
        devices_over_static=None if static is None or ours is None else static - ours,
        devices_over_monolithic=None if mono is None or ours is None else mono - ours,
        kv_bytes=budget.static_bytes - budget.pool_bytes,
        kv_share=budget.saving,
    )


def _larger(
    sampled: DemandSamples, replayed: ReplayDemand | None, quantile: float
) -> DemandSamples | ReplayDemand:
    """Returns the demand that the budget must cover: the rates miss some of a trace's bursts, and
    the trace is only one of the courses that its rates allow."""
    if replayed is None:
        return sampled
    is_bursty = replayed.quantile(quantile).value > sampled.quantile(quantile).value
    return replayed if is_bursty else sampled


def _notes(budget: Budget, system: System, ours: SystemPlan, is_bursty: bool) -> tuple[str, ...]:
    notes = []
    if is_bursty:
        notes.append(
            "the trace needs more memory than its rates suggest, since its arrivals come in "
            "clumps. The budget covers the trace, but the rates that the devices sustain hold for "
            "arrivals without clumps"
        )
    if budget.demand.value > sum(system.free):
        notes.append(
            f"the demand at the quantile, {format_size(budget.demand.value)}, exceeds the KV "
            f"memory of {format_size(sum(system.free))}: requests will wait; {ours.devices_needed} "
            "devices would be enough"
        )
    if ours.too_long > 0:
        notes.append(
            f"{ours.too_long:.3%} of the requests are longer than fits, or longer than the model's "
            "context: they are counted as if cut to it"
        )
    return tuple(notes)


def _curve(demand: DemandSamples, replayed: ReplayDemand | None) -> tuple[tuple[float, float], ...]:
    points = range(_CURVE_POINTS + 1)
    if replayed is None:
        shares = [(point + 0.5) / (_CURVE_POINTS + 1) for point in points]
        return tuple((share, demand.quantile(share).value) for share in shares)
    seconds = np.linspace(0, replayed.pool.seconds, 4 * _CURVE_POINTS, endpoint=False)
    return tuple(zip(seconds.tolist(), replayed.pool.at(seconds).tolist(), strict=True))
