"""Models that come to a device while it runs: what it holds of them, and whether it can."""

from __future__ import annotations

import logging

import msgspec

from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.models.registry import spec_of
from crosspool.models.spec import ModelSpec
from crosspool.ranks.weights import HeldModel, held_models
from crosspool.transport.links import row_bytes
from crosspool.weightpool.placement import place

log = logging.getLogger(__name__)


def further_model(
    deployment: Deployment, device: Device, number: int, config: ModelConfig
) -> tuple[ModelSpec, HeldModel | None]:
    """Reads what a further model of the deployment is, and what the device holds of it; None:
    nothing. Raises ConfigError when its checkpoint cannot be read."""
    spec = spec_of(config)
    alone = msgspec.structs.replace(deployment, models={number: config})
    specs = {number: spec}
    found = held_models(alone, device, specs, place(alone, specs))
    return spec, next(found, None)


def check_row(spec: ModelSpec, name: str, room: int | None) -> None:
    """Raises ConfigError when rows of a further model do not fit into the links, which have room
    for rows of ``room`` bytes; None: there are no links."""
    needed = row_bytes(spec)
    if room is not None and needed > room:
        raise ConfigError(
            f"model {name}: its hidden states take {needed} bytes per token, and the links between "
            f"devices were made for {room} when the server began: start the server with this model"
        )


def still_readable(deployment: Deployment) -> Deployment:
    """Returns the deployment without the models whose folders cannot be read any more, for a
    process that takes the place of another: such a model is not to end all the others."""
    for number, config in deployment.models.items():
        try:
            spec_of(config)
        except ConfigError as error:
            log.error("model %s cannot be served any more: %s", config.name, error)
            deployment = deployment.without_model(number)
    return deployment
