"""Whether models of a deployment can sleep, and whether they must."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import exact_size, format_size
from crosspool.weightpool.packed_cache import PackedCache, Unusable, folder_of
from crosspool.weightpool.placement import Placement, rooms

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment


def why_none_sleeps(deployment: Deployment) -> str | None:
    """Returns why no model of the deployment can sleep, in words for users; None: any can."""
    gpu = next((device.name for device in deployment.devices if not device.is_cpu), None)
    if gpu is not None:
        return f"weights on a GPU, such as {gpu}, stay there until the server ends"
    if deployment.loop == "resident" and not deployment.packed_cache_bytes:
        return (
            "the weights of a model that sleeps are read again from the packed cache, which "
            "packed_cache_bytes: 0 has turned off"
        )
    return None


def check_sleeping(deployment: Deployment, placement: Placement) -> None:
    """Raises ConfigError when models must sleep and cannot: says for which reason, and what would
    be right."""
    must = _why_some_sleep(deployment, placement)
    if must is None:
        return
    cannot = why_none_sleeps(deployment)
    if cannot is not None:
        raise ConfigError(f"{must}, but {cannot}")
    if deployment.loop == "resident":
        _check_cache(deployment, placement)


def check_loading(deployment: Deployment, placement: Placement) -> None:
    """Raises ConfigError when no model can be loaded while the server runs: it is asleep at first,
    and its packed weights must be kept beside those of all others. ``deployment`` and ``placement``
    are those with the further model."""
    cannot = why_none_sleeps(deployment)
    if cannot is not None:
        raise ConfigError(f"no model can be loaded while the server runs: {cannot}")
    if deployment.loop == "resident":
        _check_cache(deployment, placement)


def _why_some_sleep(deployment: Deployment, placement: Placement) -> str | None:
    """Returns the first reason for which weights will be read again; None where none will by
    themselves."""
    for model in deployment.models.values():
        if model.keep == "asleep":
            return f"keep: {model.name} shall be asleep until requests come"
        if model.ttl is not None:
            return f"ttl: {model.name} shall sleep after {model.ttl:g} s without a request"
        if model.experts == "demand":
            return f"experts: those of {model.name} shall be read on demand"
    for room in rooms(deployment, placement):
        if not room.holds(deployment.models):
            needed = sum(room.needed.values()) * room.devices
            return (
                f"{room.option} is too small for all models at once, whose {room.what} need "
                f"{exact_size(needed)}, so that some of them must sleep"
            )
    return None


def _check_cache(deployment: Deployment, placement: Placement) -> None:
    """Raises ConfigError when the packed cache cannot hold all models."""
    needed = sum(sum(of.values()) for of in (*placement.weight_bytes, *placement.expert_bytes))
    needed += sum(placement.attention_bytes.values())
    if needed > deployment.packed_cache_bytes:
        raise ConfigError(
            f"packed_cache_bytes: {format_size(deployment.packed_cache_bytes)} are too few for the "
            "packed weights of all models, of which those that sleep are read again: give at least "
            f"{exact_size(needed)}"
        )
    try:
        PackedCache(folder_of(deployment), deployment.packed_cache_bytes, time.time_ns())
    except Unusable as error:
        raise ConfigError(
            f"packed_cache_dir: {error}; the weights of models that sleep are read from there"
        ) from None
