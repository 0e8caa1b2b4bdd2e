"""What a plan is made from."""

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
    """Tokens that its longest request must have room for; None: as many as fit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanRequest:
    """Raises ConfigError for numbers that cannot be."""

    models: tuple[PlanModel, ...]
    devices: EqualDevices
    traffic: Traffic
    """Of the models, in their order."""
    kv_pool_devices: int | None = None
    """None: the planner chooses."""
    weight_pool_devices: int | None = None
    quantile: float = 0.99
    level: float = 0.95
    """Of the quantile's interval."""
    samples: int = 100_000
    """Random times of the Monte Carlo."""
    seed: int = 0
    charge: Charge = "active"
    page_size: int = _DEFAULTS["page_size"]
    chunk_bytes: int = _DEFAULTS["chunk_bytes"]
    window: float | None = None
    """Seconds within which rates count as constant; None: they never change."""
    peaks: bool = False
    """Analyse how peaks of the trace coincide."""
    notes: tuple[str, ...] = ()
    """What a reader of the plan ought to know of its input."""
    progress: bool | None = None
    """A bar on stderr; None: where that is a terminal."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models: name at least one, such as Qwen3-30B-A3B")
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two models are named {name!r}: write NAME={name} for one")
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
            raise ConfigError("peaks: need a trace with times of arrival")
        if not any(model.rate > 0 for model in self.traffic.models):
            raise ConfigError("rate: all request rates are 0: at least one must be above 0")
