"""The input of a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from crosspool.config.deployment import MAX_MODELS, Deployment
from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size
from crosspool.planner.demand.kv_model import Charge
from crosspool.planner.demand.quantile import check_probability
from crosspool.planner.devices.systems import EqualDevices
from crosspool.planner.network import HostNetwork
from crosspool.planner.shapes.shape import ModelShape
from crosspool.planner.traffic.samples import Traffic

_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Deployment)}


@dataclass(frozen=True, kw_only=True)
class PlanModel:
    """One model of the deployment."""

    name: str
    shape: ModelShape
    context: int | None = None
    """Tokens of the longest request that must fit; None for as many as fit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanRequest:
    """All input of a plan. Raises ConfigError for impossible numbers."""

    models: tuple[PlanModel, ...]
    devices: EqualDevices
    traffic: Traffic
    """Traffic of the models, in their order."""
    kv_pool_devices: int | None = None
    """Number of KV pool devices; None lets the planner choose."""
    weight_pool_devices: int | None = None
    """Number of weight pool devices; None lets the planner choose."""
    weight_pool_bytes: int | None = None
    """Bytes for FFN weights over the whole weight pool; models sleep where it holds fewer of them
    than there are. None has room for all."""
    wake_bytes_per_s: float = 2e9
    """Bytes per second at which a device reads the weights of a model that is woken."""
    residency_quantum: float = _DEFAULTS["residency_quantum"]
    """Seconds for which a woken model with requests keeps its room while others wait for it."""
    quantile: float = 0.99
    """Quantile of KV demand that the page budget covers."""
    level: float = 0.95
    """Confidence of the quantile's interval."""
    samples: int = 100_000
    """Number of random times at which demand is drawn."""
    seed: int = 0
    charge: Charge = "active"
    page_size: int = _DEFAULTS["page_size"]
    chunk_bytes: int = _DEFAULTS["chunk_bytes"]
    window: float | None = None
    """Seconds for which rates count as constant; None when they never change."""
    network: HostNetwork | None = None
    """The network that hidden states cross where the pools are on different hosts; None says
    nothing of it."""
    lanes: int = _DEFAULTS["lanes"]
    """Batches in flight on each KV pool device; it counts for the network alone."""
    peaks: bool = False
    """Whether to analyse how the models' peaks in the trace coincide."""
    notes: tuple[str, ...] = ()
    """Remarks on the input, for the reader of the plan."""
    progress: bool | None = None
    """Whether to show progress bars on stderr; None does so on a terminal."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models: name at least one, such as Qwen3-30B-A3B")
        self._check_weight_pool()
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two models are named {name!r}: write NAME={name} to rename one")
        least_of = {"samples": 100, "page_size": 1, "chunk_bytes": 1, "seed": 0, "lanes": 1}
        for field, least in least_of.items():
            value = getattr(self, field)
            if value < least:
                raise ConfigError(f"{field} {value}: must be at least {least}")
        for field in ("kv_pool_devices", "weight_pool_devices"):
            value = getattr(self, field)
            if value is not None and not 1 <= value <= self.devices.count:
                raise ConfigError(
                    f"{field} {value}: must be between 1 and the number of devices, "
                    f"{self.devices.count}"
                )
        for field in ("wake_bytes_per_s", "residency_quantum"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field} {value:g}: must be a finite number above 0")
        check_probability("quantile", self.quantile)
        check_probability("level", self.level)
        if self.window is not None and not self.window > 0:
            raise ConfigError(f"window {self.window}: must be above 0 seconds")
        if self.peaks and any(model.arrivals is None for model in self.traffic.models):
            raise ConfigError("peaks: they need a trace with arrival times")
        if not any(model.rate > 0 for model in self.traffic.models):
            raise ConfigError("rate: all request rates are 0: at least one must be above 0")

    @property
    def pooled_ffn_bytes(self) -> int:
        """Bytes of FFN weights that are in the weight pool at the same time, at most."""
        every = sum(model.shape.ffn_bytes for model in self.models)
        return every if self.weight_pool_bytes is None else min(every, self.weight_pool_bytes)

    @property
    def models_sleep(self) -> bool:
        """Whether the weight pool holds fewer models than there are."""
        return self.pooled_ffn_bytes < sum(model.shape.ffn_bytes for model in self.models)

    def _check_weight_pool(self) -> None:
        if self.weight_pool_bytes is None:
            return
        largest = max(self.models, key=lambda model: model.shape.ffn_bytes)
        needed = largest.shape.ffn_bytes
        if needed > self.weight_pool_bytes:
            raise ConfigError(
                f"weight_pool_bytes {format_size(self.weight_pool_bytes)}: the FFN weights of "
                f"{largest.name} take {format_size(needed)}, so it could never be resident; raise "
                "it, or leave the model out"
            )
        if len(self.models) > MAX_MODELS:
            raise ConfigError(
                f"weight_pool_bytes: {len(self.models)} models, and a server has {MAX_MODELS} at "
                "most, whether they sleep or not; leave it out, or plan for fewer"
            )
