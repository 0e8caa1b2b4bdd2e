"""The input of a plan."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from crosspool.config.deployment import Deployment
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.kv_model import Charge
from crosspool.planner.demand.quantile import check_probability
from crosspool.planner.devices.systems import EqualDevices
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
    peaks: bool = False
    """Whether to analyse how the models' peaks in the trace coincide."""
    notes: tuple[str, ...] = ()
    """Remarks on the input, for the reader of the plan."""
    progress: bool | None = None
    """Whether to show progress bars on stderr; None does so on a terminal."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models: name at least one, such as Qwen3-30B-A3B")
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two models are named {name!r}: write NAME={name} to rename one")
        for field, least in (("samples", 100), ("page_size", 1), ("chunk_bytes", 1), ("seed", 0)):
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
        check_probability("quantile", self.quantile)
        check_probability("level", self.level)
        if self.window is not None and not self.window > 0:
            raise ConfigError(f"window {self.window}: must be above 0 seconds")
        if self.peaks and any(model.arrivals is None for model in self.traffic.models):
            raise ConfigError("peaks: they need a trace with arrival times")
        if not any(model.rate > 0 for model in self.traffic.models):
            raise ConfigError("rate: all request rates are 0: at least one must be above 0")
