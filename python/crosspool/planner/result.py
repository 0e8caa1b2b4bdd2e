"""The result of planning."""

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
from crosspool.planner.network import NetworkPlan
from crosspool.planner.residency import ResidencyPlan


class ModelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of one model; sizes are in bytes."""

    name: str
    shape: str
    """Id of the model's shape."""
    rate: float
    """Requests per second."""
    kv_bytes_per_token: int
    state_bytes: int
    """Recurrent state per request, beside KV."""
    attention_bytes: int
    """Weights on every KV pool device."""
    ffn_bytes: int
    context: int
    """Tokens of the longest request that the plan has room for: as asked, or as many as fit."""
    longest: int
    """Tokens of the longest request that a KV pool device holds, at most the model's context."""
    own_bytes: int
    """The model's own KV demand at the quantile."""
    served: Parallelism
    """Parallelism of CrossPool's server, and so the memory that a request sees."""
    paper: Parallelism
    """Parallelism of the paper's type for this model on the same number of ranks."""
    weight_devices: tuple[int, ...]
    """Numbers within the weight pool of the devices that share the model's FFN weights."""


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """Savings over static partition and monolithic serving of the same traffic and contexts."""

    devices_over_static: int | None
    devices_over_monolithic: int | None
    kv_bytes: int
    """Bytes by which the budget is below the sum of the models' own demands at the quantile."""
    kv_share: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    devices: EqualDevices
    shared_device: bool
    """Whether both pools are on one device."""
    kv_devices: int
    kv_devices_needed: int
    """Number of devices that is enough for the demand at the quantile."""
    weight_devices: int
    weight_devices_needed: int
    """Number of devices that is enough for the FFN weights."""
    quantile: float
    charge: Charge
    arrivals: str
    """Description of the arrivals that were assumed."""
    rate: float
    """Requests per second of all models together."""
    budget: Budget
    kv_bytes: int
    """Bytes of KV memory on the KV pool's devices."""
    exceeds: float
    """Share of the time in which demand exceeds ``kv_bytes``, so that requests wait."""
    sampled: QuantileEstimate
    """Quantile of demand in bytes by Monte Carlo. The budget covers the larger of this and
    ``replayed``."""
    replayed: QuantileEstimate | None
    """The exact quantile over the trace's own time; None without arrival times."""
    models: tuple[ModelPlan, ...]
    groups: Groups
    residency: ResidencyPlan | None
    """What requests find in the weight pool; None where it holds all models."""
    network: tuple[NetworkPlan, ...]
    """What a step of each model costs over the network; empty where none was given, and without
    models that have no requests."""
    systems: tuple[SystemPlan, ...]
    """Results of static partition, monolithic serving with shared KV memory, and CrossPool."""
    saved: Saved
    peaks: PeakReport | None
    notes: tuple[str, ...]
    curve: tuple[tuple[float, float], ...]
    """Points of the plot: a quantile, or a second of the trace, and the pool's demand in bytes."""
    curve_over_time: bool
    """Whether the curve is over the trace's seconds."""
