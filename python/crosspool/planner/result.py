"""What a plan says."""

from __future__ import annotations

import msgspec

from crosspool.planner.compare import SystemPlan
from crosspool.planner.demand.budget import Budget
from crosspool.planner.demand.kv_model import Charge
from crosspool.planner.demand.peaks import PeakReport
from crosspool.planner.demand.quantile import QuantileEstimate
from crosspool.planner.devices.groups import Groups
from crosspool.planner.devices.parallelism import Parallelism
from crosspool.planner.devices.systems import EqualDevices


class ModelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One model; sizes in bytes."""

    name: str
    shape: str
    """The shape's id."""
    rate: float
    """Requests per second."""
    kv_bytes_per_token: int
    attention_bytes: int
    """On every KV pool device."""
    ffn_bytes: int
    context: int
    """Tokens of the longest request that is planned for: what was asked, or what fits."""
    longest: int
    """Tokens of the longest request that a KV pool device holds, at most the model's context."""
    own_bytes: int
    """Its own KV demand at the quantile."""
    served: Parallelism
    """What CrossPool's server does, and so what a request sees."""
    paper: Parallelism
    """The paper's type for this model on as many ranks."""
    weight_devices: tuple[int, ...]
    """Weight pool devices that share its FFN weights, by number within the pool."""


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """Against static partition and monolithic serving of the same traffic and contexts."""

    devices_over_static: int | None
    devices_over_monolithic: int | None
    kv_bytes: int
    """Budget against the sum of every model's own demand at the quantile."""
    kv_share: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    devices: EqualDevices
    shared_device: bool
    """Both pools are on one device."""
    kv_devices: int
    kv_devices_needed: int
    """Enough for the demand at the quantile."""
    weight_devices: int
    weight_devices_needed: int
    """Enough for the FFN weights."""
    quantile: float
    charge: Charge
    arrivals: str
    """How arrivals were taken to come."""
    rate: float
    """Requests per second of all models."""
    budget: Budget
    kv_bytes: int
    """KV memory on the KV pool's devices."""
    exceeds: float
    """Part of the time in which the demand exceeds ``kv_bytes``: requests wait."""
    sampled: QuantileEstimate
    """Demand in bytes by Monte Carlo. The budget is for the larger of this and the next."""
    replayed: QuantileEstimate | None
    """The quantile over the trace's own time, exactly; None: no times of arrival."""
    models: tuple[ModelPlan, ...]
    groups: Groups
    systems: tuple[SystemPlan, ...]
    """Static partition, monolithic with shared KV memory, CrossPool."""
    saved: Saved
    peaks: PeakReport | None
    notes: tuple[str, ...]
    curve: tuple[tuple[float, float], ...]
    """Pool demand in bytes by quantile, for the plot; or by second of the trace."""
    curve_over_time: bool
