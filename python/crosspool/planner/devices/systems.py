"""Where weights and KV cache lie under the three ways to serve several models, in bytes: static
partition (each model has devices of its own), monolithic with shared KV memory (kvcached: weights
of several models on a device, what they leave is KV memory of any of them), and CrossPool.

Weights of a monolithic server on n devices, as SGLang splits them: FFN, embeddings and LM head by
n; the rest of the attention part by the ranks of a data-parallel group (one, for MLA: every device
holds all of it). SGLang keeps the token embedding whole in every group; here it is split, without
which the paper's own placement on five 40 GB devices has no room at all (docs/planner.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.planner.devices.parallelism import Parallelism, Room, parallelism, room, served
from crosspool.planner.shapes.shape import ModelShape

DEVICE_RESERVE = 0.182
"""Part of a device that serves attention which holds neither weights nor KV cache: activations,
captured graphs, communication buffers, the driver's context. SGLang keeps back 17 to 23 % of a
40 GB GPU (its ``mem_fraction_static``, by tensor and data parallelism); 18.14 to 18.33 % is what
puts both of the paper's cliffs for GLM-4.7-Flash into its 16-32K bin (docs/planner.md)."""
WEIGHT_DEVICE_RESERVE = 0.05
"""The same of a device with FFN weights only: it has no KV cache and sees the rows of the lanes,
no prompts at once. The paper's placement puts 36.1 GB on each 40 GB device: 9.7 % at most."""


class EqualDevices(msgspec.Struct, frozen=True, kw_only=True):
    """Equal devices. Raises ConfigError for numbers that cannot be."""

    count: int
    bytes: int
    """Memory of each."""
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
        """Bytes of a device for weights and KV cache."""
        return int(self.bytes * (1 - self.reserve))

    @property
    def usable_for_weights(self) -> int:
        """Bytes of a weight pool device for FFN weights."""
        return int(self.bytes * (1 - self.weight_reserve))


class System(msgspec.Struct, frozen=True, kw_only=True):
    """Models on devices, one of the three ways."""

    free: tuple[int, ...]
    """KV bytes by device; negative where weights do not fit."""
    rooms: tuple[Room, ...]
    """By model, if all the KV memory that it may use were its own."""
    attention: tuple[Parallelism, ...]
    """By model."""

    @property
    def fits(self) -> bool:
        """Weights fit on every device."""
        return min(self.free) >= 0


def weights_on_rank(shape: ModelShape, attention: Parallelism) -> int:
    """Bytes of a model's weights on each device of a monolithic server."""
    split = shape.ffn_bytes + shape.embedding_bytes
    return (
        split // attention.ranks
        + (shape.attention_bytes - shape.embedding_bytes) // attention.group
    )


def monolithic(
    shapes: Sequence[ModelShape], places: Sequence[Sequence[int]], devices: EqualDevices
) -> System:
    """``places``: the devices of each model. Static partition is the case in which no device is in
    two of them."""
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
    """The KV pool on ``kv_devices`` devices; ``beside``: FFN bytes on each of them too, where the
    pools share devices."""
    attention = sum(shape.attention_bytes for shape in shapes)
    free = (devices.usable - attention - beside,) * kv_devices
    way = served(kv_devices)
    return System(
        free=free,
        rooms=(room(free, way),) * len(shapes),
        attention=(way,) * len(shapes),
    )
