"""Plans the baseline of monolithic serving with shared KV memory (kvcached): of several placements,
the one that sustains the most traffic."""

from __future__ import annotations

from functools import cache

from crosspool.planner.compare import (
    Requirements,
    SystemPlan,
    devices_of,
    does_not_fit,
    fewest,
    kv_model,
    longest_of,
    reaches,
    sustained_factor,
    system_plan,
)
from crosspool.planner.demand.capacity import some
from crosspool.planner.demand.compound import exact_demand
from crosspool.planner.devices.shared_placement import Placed, place_shared
from crosspool.planner.request import PlanRequest

_MOST_DEVICES = 64
"""Most devices that are tried, or four times as many as the weights alone need."""
_MANY_MODELS = 40
_FEW_WAYS = 2
"""Number of placements, those with the most KV memory, that are compared for many models."""


def shared_monolithic(request: PlanRequest, wanted: Requirements) -> SystemPlan:
    """Plans monolithic servers on shared devices, where any model may use the KV memory that
    weights leave. The memory of models that share devices, directly or through other models,
    counts as one. This favours the baseline, as a request sees only a part of it."""
    shapes = [model.shape for model in request.models]

    @cache
    def on(number: int) -> list[Placed]:
        return place_shared(shapes, devices_of(request.devices, number))

    @cache
    def demand(models: tuple[int, ...]) -> float:
        if len(models) == 1:
            return wanted.own_bytes[models[0]]
        if len(models) == len(shapes):
            return wanted.pool_bytes
        found = exact_demand(
            some(request.traffic, models),
            [kv_model(request, index, wanted.contexts[index]) for index in models],
            request.charge,
            chunk_bytes=request.chunk_bytes,
        )
        return found.quantile(request.quantile).value

    def is_enough(placed: Placed) -> bool:
        rooms = placed.system.rooms
        return all(
            rooms[index].total >= wanted.own_bytes[index]
            and reaches(request, index, placed.system, index, tokens)
            for index, tokens in enumerate(wanted.contexts)
        ) and all(size >= demand(models) for models, size in placed.components)

    first = -(-sum(shape.weight_bytes for shape in shapes) // request.devices.usable)
    limit = max(_MOST_DEVICES, 4 * first)
    needed = fewest(lambda number: any(map(is_enough, on(number))), first, limit)
    ways = on(request.devices.count)
    if not ways:
        least = fewest(lambda number: bool(on(number)), first, limit)
        return does_not_fit(request, "monolithic", least, needed)
    if len(shapes) > _MANY_MODELS:
        ways = ways[:_FEW_WAYS]
    factors = [_sustained(request, placed) for placed in ways]
    best = ways[factors.index(max(factors))]
    return system_plan(
        request,
        "monolithic",
        best.places,
        kv_bytes=sum(best.system.free),
        longest=_longest(request, best),
        factor=max(factors),
        devices_needed=needed,
    )


def _longest(request: PlanRequest, placed: Placed) -> tuple[int, ...]:
    models = range(len(request.models))
    return tuple(longest_of(request, index, placed.system, index) for index in models)


def _sustained(request: PlanRequest, placed: Placed) -> float:
    """Returns the least factor on rates among the groups of models and the models' own rooms."""
    longest = _longest(request, placed)
    limits = dict(placed.components)
    limits |= {
        (index,): room.total
        for index, room in enumerate(placed.system.rooms)
        if request.traffic.models[index].rate > 0
    }
    return min(
        sustained_factor(request, models, longest, limit) for models, limit in limits.items()
    )
