"""What the same devices give under the three ways to serve, and how many devices each needs."""

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
    """One way to serve on the same devices."""

    name: SystemName
    fits: bool
    """The weights fit; all else is zero where they do not."""
    reason: str | None
    """Why not."""
    places: Places
    """Devices of each model's attention and KV cache."""
    kv_bytes: int
    """KV memory on all devices."""
    longest: tuple[int, ...]
    """By model: tokens of the longest request, at most the model's context."""
    sustained: float
    """Requests per second of all models, in the traffic's proportions, with which demand stays in
    the KV memory for the plan's quantile of the time."""
    too_long: float
    """Share of the requests that are longer than what fits, or than the model's context."""
    devices_needed: int | None
    """Equal devices that hold the weights, the planned contexts, and the traffic's demand at the
    plan's quantile; None: none were enough, of as many as were tried."""


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """What a way to serve has to have room for."""

    contexts: tuple[int, ...]
    """By model: tokens of the longest request."""
    own_bytes: tuple[int, ...]
    """By model: its own demand at the quantile."""
    pool_bytes: int
    """Demand of all models at the quantile."""


def static_partition(request: PlanRequest, wanted: Requirements) -> SystemPlan:
    """Every model has devices of its own: as many as its weights need, and those that are left go
    one by one to the model that is shortest of memory for its demand or its context."""
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
    """CrossPool: all models share the KV memory of ``system``."""
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
    """A way to serve that fits; ``factor``: by how much it sustains all of the traffic's rates."""
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
    """The greatest factor on the rates of ``models`` with which their demand stays within
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
    """Tokens of the model's longest request in a group's memory, in whole chunks and pages, at most
    its context."""
    shape = request.models[index].shape
    layout = KVLayout(shape, request.page_size, request.chunk_bytes)
    pages = layout.pages_in(max(0, group_bytes) // request.chunk_bytes)
    return min(shape.context, pages * request.page_size)


def longest_of(request: PlanRequest, index: int, system: System, room: int) -> int:
    return longest_in(request, index, max(system.rooms[room].groups, default=0))


def reaches(request: PlanRequest, index: int, system: System, room: int, tokens: int) -> bool:
    return system.fits and longest_of(request, index, system, room) >= tokens


def _own(request: PlanRequest, index: int, number: int) -> System:
    """The model alone on as many devices."""
    return monolithic(
        [request.models[index].shape], [range(number)], devices_of(request.devices, number)
    )


def devices_of(devices: EqualDevices, number: int) -> EqualDevices:
    return msgspec.structs.replace(devices, count=number)


def fewest(enough: Callable[[int], bool], first: int = 1, most: int = _MOST_DEVICES) -> int | None:
    """The least number of devices, of ``first`` to ``most``, that is enough."""
    return next((number for number in range(first, most + 1) if enough(number)), None)


def _own_is_enough(request: PlanRequest, wanted: Requirements, index: int, number: int) -> bool:
    """As many devices of its own give the model all that is wanted."""
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
    return KVModel(model.name, model.shape.kv_bytes_per_token, request.page_size, max(2, context))


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
