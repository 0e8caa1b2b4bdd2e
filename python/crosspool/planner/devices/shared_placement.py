"""Placements of models on monolithic servers with shared KV memory (kvcached).

This is a short heuristic for the baseline: every model takes as few devices as keep its weights on
each below a limit, the largest model first, on the devices with most room. Several limits are
tried, from 0 (every model on every device) to a whole device. On the paper's five devices it finds
the paper's own placement, and one in which no model shares a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from crosspool.planner.devices.parallelism import parallelism
from crosspool.planner.devices.systems import EqualDevices, System, monolithic, weights_on_rank
from crosspool.planner.shapes.shape import ModelShape

_LIMITS = (0.0, *(number / 20 for number in range(1, 21)))
"""Shares of a device's memory that one model's weights may take."""
_FEW_LIMITS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
_MANY_MODELS = 40


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """One placement of the models."""

    places: tuple[tuple[int, ...], ...]
    """Devices of each model."""
    system: System

    @property
    def components(self) -> list[tuple[tuple[int, ...], int]]:
        """Groups of models that share devices, directly or through other models, with the bytes of
        KV memory on their devices. One group cannot use what another leaves."""
        merged: list[tuple[set[int], set[int]]] = []
        for model, place in enumerate(self.places):
            models, devices = {model}, set(place)
            apart = []
            for other in merged:
                if other[1] & devices:
                    models |= other[0]
                    devices |= other[1]
                else:
                    apart.append(other)
            merged = [*apart, (models, devices)]
        return [
            (tuple(sorted(models)), sum(self.system.free[device] for device in devices))
            for models, devices in merged
        ]


def place_shared(shapes: Sequence[ModelShape], devices: EqualDevices) -> list[Placed]:
    """Returns the placements that fit, beginning with the one that leaves the most KV memory. The
    list is empty when none was found."""
    numbers = dict.fromkeys(
        tuple(_fewest(shape, limit, devices) for shape in shapes)
        for limit in (_LIMITS if len(shapes) <= _MANY_MODELS else _FEW_LIMITS)
    )
    found = []
    for each in numbers:
        places = _place(shapes, each, devices)
        system = monolithic(shapes, places, devices)
        if min(system.free) > 0:
            found.append(Placed(places=tuple(places), system=system))
    return sorted(found, key=lambda placed: -sum(placed.system.free))


def _fewest(shape: ModelShape, limit: float, devices: EqualDevices) -> int:
    """Returns the fewest devices on each of which the model's weights take at most ``limit`` of
    the usable memory, or the number of all devices."""
    for number in range(1, devices.count):
        if _held(shape, number) <= limit * devices.usable:
            return number
    return devices.count


def _place(
    shapes: Sequence[ModelShape], numbers: Sequence[int], devices: EqualDevices
) -> list[tuple[int, ...]]:
    free = [devices.usable] * devices.count
    places: list[tuple[int, ...]] = [()] * len(shapes)
    held = [_held(shape, number) for shape, number in zip(shapes, numbers, strict=True)]
    for index in sorted(range(len(shapes)), key=lambda index: -held[index]):
        roomiest = sorted(range(devices.count), key=lambda device: -free[device])
        places[index] = tuple(sorted(roomiest[: numbers[index]]))
        for device in places[index]:
            free[device] -= held[index]
    return places


def _held(shape: ModelShape, number: int) -> int:
    return weights_on_rank(shape, parallelism(shape.attention, shape.kv_heads, number))
