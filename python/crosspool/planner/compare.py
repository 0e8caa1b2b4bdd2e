"""Compares the three ways to serve on the same devices, and counts the devices that each needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import msgspec

from crosspool.kvpool.layout import KVLayout
from crosspool.planner.demand.capacity import some, sustained, too_long
from crosspool.planner.demand.kv_model import KVModel
from crosspool.planner.devices.systems import EqualDevices, System, monolithic
from crosspool.planner.request import PlanRequest

_MOST_DEVICES = 1024

SystemName = Literal["static", "monolithic", "crosspool"]
Places = tuple[tuple[int, ...], ...]
"""Devices of each model."""


class SystemPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one way to serve on the same devices."""

    name: SystemName
    fits: bool
    """Whether the weights fit; when they do not, all other numbers are zero."""
    reason: str | None
    """The reason why the weights do not fit; None when they do."""
    places: Places
    """Devices that hold each model's attention part and KV cache."""
    kv_bytes: int
    """Bytes of KV memory on all devices."""
    longest: tuple[int, ...]
    """Tokens of each model's longest request, at most its context."""
    sustained: float
    """Requests per second of all models together, in the traffic's proportions, with which demand
    stays within the KV memory for the plan's quantile of the time."""
    too_long: float
    """Share of the requests that are longer than fits, or longer than the model's context."""
    devices_needed: int | None
    """Number of devices that hold the weights, the planned contexts, and the traffic's demand at
    the plan's quantile; None when no number that was tried is enough."""


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """The demand that every way to serve must have room for."""

    contexts: tuple[int, ...]
    """Tokens of each model's longest request."""
    own_bytes: tuple[int, ...]
    """Each model's own demand at the quantile, in bytes."""
    pool_bytes: int
    """Demand of all models together at the quantile, in bytes."""


def static_partition(request: PlanRequest, wanted: Requirements) -> SystemPlan:
    """Plans static partition: every model gets as many devices of its own as its weights need.
    Further devices go one by one to the model that is shortest of memory for its demand or its
    context."""
    count = request.devices.count
    models = range(len(request.models))
    needed = [fewest(partial(_own_is_enough, request, wanted, index)) for index in models]
    least = [fewest(partial(_own_holds_weights, request, index)) for index in models]
    devices_needed, total = _sum(needed), _sum(least)
    if total is None or total > count:
        return does_not_fit(request, "static", total, devices_needed)
    numbers = [number or 0 for number in least]
    systems = [_own(request, index, number) for index, number in enumerate(numbers)]
    for _ in range(count - total):
        poorest = max(
            range(len(numbers)),
            key=lambda index: _shortage(request, index, systems[index], wanted),
        )
        numbers[poorest] += 1
        systems[poorest] = _own(request, poorest, numbers[poorest])
    ends = [sum(numbers[: index + 1]) for index in range(len(numbers))]
    places = tuple(
        tuple(range(end - number, end)) for end, number in zip(ends, numbers, strict=True)
    )
    longest = tuple(longest_of(request, index, system, 0) for index, system in enumerate(systems))
    factor = min(
        sustained_factor(request, [index], longest, system.rooms[0].total)
        for index, system in enumerate(systems)
        if request.traffic.models[index].rate > 0
    )
    return system_plan(
        request,
        "static",
        places,
        kv_bytes=sum(system.rooms[0].total for system in systems),
        longest=longest,
        factor=factor,
        devices_needed=devices_needed,
    )


def pooled(
    request: PlanRequest, system: System, places: Places, devices_needed: int | None
) -> SystemPlan:
    """Plans CrossPool: all models share the KV memory of ``system``."""
    models = range(len(request.models))
    longest = tuple(longest_of(request, index, system, index) for index in models)
    return system_plan(
        request,
        "crosspool",
        places,
        kv_bytes=sum(system.free),
        longest=longest,
        factor=sustained_factor(request, models, longest, sum(system.free)),
        devices_needed=devices_needed,
    )


def system_plan(
    request: PlanRequest,
    name: SystemName,
    places: Places,
    *,
    kv_bytes: int,
    longest: tuple[int, ...],
    factor: float,
    devices_needed: int | None,
) -> SystemPlan:
    """Returns the result of a way to serve that fits, and that sustains ``factor`` times the
    traffic's rates."""
    return SystemPlan(
        name=name,
        fits=True,
        reason=None,
        places=places,
        kv_bytes=kv_bytes,
        longest=longest,
        sustained=factor * sum(model.rate for model in request.traffic.models),
        too_long=too_long(request.traffic, longest),
        devices_needed=devices_needed,
    )


def sustained_factor(
    request: PlanRequest, models: Sequence[int], longest: Sequence[int], limit_bytes: int
) -> float:
    """Returns the greatest factor on the rates of ``models`` with which their demand stays within
    ``limit_bytes`` for the plan's quantile of the time."""
    return sustained(
        some(request.traffic, models),
        [kv_model(request, index, longest[index]) for index in models],
        limit_bytes,
        request.quantile,
        chunk_bytes=request.chunk_bytes,
        charge=request.charge,
    )


def longest_in(request: PlanRequest, index: int, group_bytes: int) -> int:
    """Returns the tokens of the model's longest request in the memory of a group, counted in whole
    chunks and pages, and at most its context."""
    shape = request.models[index].shape
    layout = KVLayout(shape, request.page_size, request.chunk_bytes)
    pages = layout.pages_in(max(0, group_bytes) // request.chunk_bytes)
    return min(shape.context, layout.tokens_in(pages))


def longest_of(request: PlanRequest, index: int, system: System, room: int) -> int:
    return longest_in(request, index, max(system.rooms[room].groups, default=0))


def reaches(request: PlanRequest, index: int, system: System, room: int, tokens: int) -> bool:
    return system.fits and longest_of(request, index, system, room) >= tokens


def _own(request: PlanRequest, index: int, number: int) -> System:
    """Returns the memory of the model alone on ``number`` devices."""
    return monolithic(
        [request.models[index].shape], [range(number)], devices_of(request.devices, number)
    )


def devices_of(devices: EqualDevices, number: int) -> EqualDevices:
    return msgspec.structs.replace(devices, count=number)


def fewest(enough: Callable[[int], bool], first: int = 1, most: int = _MOST_DEVICES) -> int | None:
    """Returns the least number of devices from ``first`` to ``most`` that is enough, or None."""
    return next((number for number in range(first, most + 1) if enough(number)), None)


def _own_is_enough(request: PlanRequest, wanted: Requirements, index: int, number: int) -> bool:
    """Whether ``number`` devices of its own have room for the model's demand and context."""
    system = _own(request, index, number)
    has_room = system.rooms[0].total >= wanted.own_bytes[index]
    return has_room and reaches(request, index, system, 0, wanted.contexts[index])


def _own_holds_weights(request: PlanRequest, index: int, number: int) -> bool:
    return _own(request, index, number).free[0] > 0


def _shortage(request: PlanRequest, index: int, system: System, wanted: Requirements) -> float:
    demand = wanted.own_bytes[index] / max(1, system.rooms[0].total)
    context = wanted.contexts[index] / max(1, longest_of(request, index, system, 0))
    return max(demand, context)


def kv_model(request: PlanRequest, index: int, context: int) -> KVModel:
    model = request.models[index]
    shape = model.shape
    return KVModel(
        name=model.name,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        page_size=request.page_size,
        context=max(2, context),
        state_bytes=shape.state_bytes,
        state_row=shape.state_row,
    )


def _sum(numbers: Sequence[int | None]) -> int | None:
    return None if None in numbers else sum(number or 0 for number in numbers)


def does_not_fit(
    request: PlanRequest, name: SystemName, least: int | None, devices_needed: int | None
) -> SystemPlan:
    return SystemPlan(
        name=name,
        fits=False,
        reason=f"the weights alone need {least or 'many more'} devices",
        places=((),) * len(request.models),
        kv_bytes=0,
        longest=(0,) * len(request.models),
        sustained=0.0,
        too_long=1.0,
        devices_needed=devices_needed,
    )
