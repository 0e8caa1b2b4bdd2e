"""What it costs that hidden states cross a network between the pools.

Per layer, an attention rank sends the rows of a step to every FFN rank that shares the model, and
gets as many back from each, both in the model's dtype (docs/architecture.md, two placements). With
``n`` the time that this takes and ``c`` the time between tokens divided by the layers, a lane's
network time is hidden while other lanes compute: for ``(L - 1) / L`` of ``c`` with ``L`` lanes.
What is left of ``n`` is added to each layer. A layer also takes at least as long as the network
carries the rows of all lanes in one direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.planner.shapes.shape import ModelShape

ACCEPTED_SHARE = 0.1
"""Share of the time between tokens that the network may add where the pools lie apart."""

Suits = Literal["apart", "one_device", "together"]
"""Which placement suits a model: pools on different hosts with the FFN ranks of the plan; the same
with one FFN rank; both pools on one host."""


@dataclass(frozen=True, kw_only=True)
class HostNetwork:
    """The network between hosts, from the point of view of one of them, which sends and receives at
    the same time. Raises ConfigError for impossible numbers."""

    bytes_per_s: float
    latency_s: float
    """Seconds that the first byte takes one way."""

    def __post_init__(self) -> None:
        for field, least in (("bytes_per_s", 1.0), ("latency_s", 0.0)):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= least):
                raise ConfigError(f"network: {field} {value:g}: must be at least {least:g}")

    def one_way(self, size: float) -> float:
        """Returns the seconds after which ``size`` bytes are there."""
        return self.latency_s + size / self.bytes_per_s


class NetworkCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a step of one model costs on one attention rank; times are in seconds."""

    rows: int
    """Rows of a decode step over all lanes: the mean number of requests at a time, at least 1."""
    layers: int
    ranks: int
    """FFN ranks that share the model."""
    layer_bytes: int
    """Bytes that are dispatched for each layer, and combined again, over all lanes and ranks."""
    layer_s: float
    """Time of one layer's way there and back, for one lane."""
    serial_s: float
    """Time that a step of one lane alone spends on the network."""
    added_s: float
    """Time that is added to a step, since lanes do not hide it."""
    added_share: float
    """The same over the time between tokens without a network."""


class NetworkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of one model, with the FFN ranks of the plan and with one, and what suits it."""

    name: str
    planned: NetworkCost
    one_device: NetworkCost
    suits: Suits


def network_cost(
    shape: ModelShape, network: HostNetwork, *, rows: int, ranks: int, lanes: int, tbt_s: float
) -> NetworkCost:
    """Returns what a step of ``rows`` rows costs that ``lanes`` lanes share, where tokens come
    every ``tbt_s`` seconds without a network."""
    used = min(lanes, rows)
    row_bytes = shape.hidden * shape.dtype_bytes * ranks
    layer = 2 * network.one_way(math.ceil(rows / used) * row_bytes)
    compute = tbt_s / shape.layers
    cycle = max(
        compute + max(0.0, layer - compute * (used - 1) / used),
        rows * row_bytes / network.bytes_per_s,
    )
    added = shape.layers * (cycle - compute)
    return NetworkCost(
        rows=rows,
        layers=shape.layers,
        ranks=ranks,
        layer_bytes=rows * row_bytes,
        layer_s=layer,
        serial_s=shape.layers * 2 * network.one_way(rows * row_bytes),
        added_s=added,
        added_share=added / tbt_s,
    )


def network_plan(
    name: str,
    shape: ModelShape,
    network: HostNetwork,
    *,
    rows: int,
    ranks: int,
    lanes: int,
    tbt_s: float,
    fits_one: bool,
) -> NetworkPlan:
    """``fits_one``: whether one device of the weight pool could hold the model's FFN weights."""
    planned, one = (
        network_cost(shape, network, rows=rows, ranks=number, lanes=lanes, tbt_s=tbt_s)
        for number in (ranks, 1)
    )
    suits: Suits = "together"
    if planned.added_share <= ACCEPTED_SHARE:
        suits = "apart"
    elif fits_one and one.added_share <= ACCEPTED_SHARE:
        suits = "one_device"
    return NetworkPlan(name=name, planned=planned, one_device=one, suits=suits)
