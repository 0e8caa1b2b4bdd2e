"""Whether the KV pool holds the requests that it must."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.sizes import exact_size, format_size
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import ModelSpec

log = logging.getLogger(__name__)


def check_kv_bounds(d: Deployment, specs: Mapping[int, ModelSpec]) -> None:
    """Raises ConfigError when the floors of all models do not fit into the pool together, or when
    the KV memory that one of the models in ``specs`` can be promised on one attention rank does not
    hold a request as long as its context."""
    bounds, ranks = Bounds.of(d), len(d.kv_pool_devices)
    if sum(bounds.floors.values()) > bounds.budget:
        floors = sum(bounds.floors.values()) * d.chunk_bytes * ranks
        raise ConfigError(
            f"kv_floor_bytes: the floors of all models come to {format_size(floors)} in whole "
            f"chunks, more than the KV pool's {format_size(d.kv_pool_bytes)}: lower them or give "
            "a larger --kv-pool-bytes"
        )
    for number, spec in specs.items():
        model = d.models[number]
        if bounds.ceilings[number] < bounds.floors[number]:
            raise ConfigError(
                f"kv_ceiling_bytes of {model.name}: {exact_size(model.kv_ceiling_bytes or 0)} is "
                f"below its kv_floor_bytes, {exact_size(model.kv_floor_bytes)} (in whole chunks of "
                "each device): raise the ceiling or lower the floor"
            )
        _check_longest(d, bounds, number, spec)
        if spec.state_bytes and d.prefix_cache:
            log.info(
                "%s: there is no prefix cache for it: no two requests share a recurrent state, of "
                "which each has %s",
                model.name,
                format_size(spec.state_bytes),
            )


def _check_longest(d: Deployment, bounds: Bounds, number: int, spec: ModelSpec) -> None:
    """Raises ConfigError that says what would be enough when one request as long as the model's
    context does not fit."""
    model, ranks = d.models[number], len(d.kv_pool_devices)
    layout = KVLayout(spec, d.page_size, d.chunk_bytes)
    chunks = -(-layout.pages_for(spec.context) * layout.page_bytes // layout.chunk_bytes)
    if chunks <= bounds.reach(number):
        return
    tokens = layout.tokens_in(layout.pages_in(bounds.reach(number)))
    shorter = f"--context-length {tokens}, or " if tokens else ""
    needed = chunks * d.chunk_bytes * ranks
    request = f"do not hold one request of {spec.context} tokens, the context of {model.name}"
    if chunks > bounds.ceilings[number] and model.kv_ceiling_bytes is not None:
        raise ConfigError(
            f"kv_ceiling_bytes of {model.name}: {format_size(model.kv_ceiling_bytes)} on {ranks} "
            f"device(s) {request}: give {shorter}a ceiling of {exact_size(needed)}"
        )
    others = (sum(bounds.floors.values()) - bounds.floors[number]) * d.chunk_bytes * ranks
    beside = f" beside the floors of other models, {format_size(others)}," if others else ""
    raise ConfigError(
        f"kv_pool_bytes: {format_size(d.kv_pool_bytes)} on {ranks} device(s){beside} {request}: "
        f"give {shorter}--kv-pool-bytes {exact_size(needed + others)}"
    )
