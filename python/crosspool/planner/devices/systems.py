"""Bytes of weights and KV cache on each device under three ways to serve several models: static
partition (each model has its own devices), monolithic with shared KV memory (kvcached: a device
holds weights of several models, and what they leave is KV memory for any of them), and CrossPool.

A monolithic server on n devices splits weights as SGLang does: FFN, embeddings and LM head by n,
the rest of the attention part by the ranks of a data-parallel group, which is one for MLA, so that
every device holds all of it. SGLang keeps the token embedding whole in every group. Here it is
split, because otherwise the paper's own placement on five 40 GB devices has no room at all
(docs/planner.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.planner.devices.parallelism import Parallelism, Room, parallelism, room, served
from crosspool.planner.shapes.shape import ModelShape

DEVICE_RESERVE = 0.182
"""Share of an attention device's memory for activations, captured graphs, communication buffers and
the driver's context. SGLang keeps back 17 to 23 % of a 40 GB GPU (its ``mem_fraction_static``,
by tensor and data parallelism); with 18.14 to 18.33 % both of the paper's cliffs for GLM-4.7-Flash
fall into its 16-32K bin (docs/planner.md)."""
WEIGHT_DEVICE_RESERVE = 0.05
"""The same share for a device with FFN weights only, which has no KV cache and sees the rows of
lanes, never whole prompts. The paper's placement puts 36.1 GB on each 40 GB device, so it is 9.7 %
at most."""


class EqualDevices(msgspec.Struct, frozen=True, kw_only=True):
    """A number of equal devices. Raises ConfigError for impossible numbers."""

    count: int
    bytes: int
    """Memory of each device, in bytes."""
    reserve: float = DEVICE_RESERVE
    weight_reserve: float = WEIGHT_DEVICE_RESERVE

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"devices: {self.count} devices: give at least one, such as 5x40GB")
        if self.bytes < 1:
            raise ConfigError(f"devices: {self.bytes} bytes of memory: give a size such as 40GB")
        for field in ("reserve", "weight_reserve"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(
                    f"device {field.replace('_', ' ')} {getattr(self, field)}: "
                    "must be at least 0 and below 1, such as 0.18"
                )

    @property
    def usable(self) -> int:
        """Bytes of a device that weights and KV cache can use."""
        return int(self.bytes * (1 - self.reserve))

    @property
    def usable_for_weights(self) -> int:
        """Bytes of a weight pool device that FFN weights can use."""
        return int(self.bytes * (1 - self.weight_reserve))


class System(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of devices that serve models in one of the three ways."""

    free: tuple[int, ...]
    """Bytes for KV cache on each device; negative where weights do not fit."""
    rooms: tuple[Room, ...]
    """Room of each model when no other model uses the shared KV memory."""
    attention: tuple[Parallelism, ...]
    """Parallelism of each model's attention."""

    @property
    def fits(self) -> bool:
        """Whether the weights fit on every device."""
        return min(self.free) >= 0


def weights_on_rank(shape: ModelShape, attention: Parallelism) -> int:
    """Returns the bytes of a model's weights on each of its devices of a monolithic server."""
    split = shape.ffn_bytes + shape.embedding_bytes
    return (
        split // attention.ranks
        + (shape.attention_bytes - shape.embedding_bytes) // attention.group
    )


def monolithic(
    shapes: Sequence[ModelShape], places: Sequence[Sequence[int]], devices: EqualDevices
) -> System:
    """Returns the memory of monolithic servers; ``places`` has the devices of each model. Static
    partition is the case in which no device serves two models."""
    ways = [
        parallelism(shape.attention, shape.kv_heads, len(place))
        for shape, place in zip(shapes, places, strict=True)
    ]
    free = [devices.usable] * devices.count
    for shape, place, way in zip(shapes, places, ways, strict=True):
        for device in place:
            free[device] -= weights_on_rank(shape, way)
    rooms = [
        room([free[device] for device in place], way)
        for place, way in zip(places, ways, strict=True)
    ]
    return System(free=tuple(free), rooms=tuple(rooms), attention=tuple(ways))


def crosspool(
    shapes: Sequence[ModelShape], kv_devices: int, devices: EqualDevices, beside: int = 0
) -> System:
    """Returns the memory of a KV pool on ``kv_devices`` devices; ``beside`` are the bytes of FFN
    weights on each of them where both pools share devices."""
    attention = sum(shape.attention_bytes for shape in shapes)
    free = (devices.usable - attention - beside,) * kv_devices
    way = served(kv_devices)
    return System(
        free=free,
        rooms=(room(free, way),) * len(shapes),
        attention=(way,) * len(shapes),
    )
