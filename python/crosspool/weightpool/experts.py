"""The expert pool: the part of the weight pool for routed experts that are in memory on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import exact_size
from crosspool.kernels import native
from crosspool.kernels import native_structs as ns
from crosspool.models.spec import DTYPE_BYTES, ModelSpec, MoEFFN
from crosspool.weightpool.placement import FFNShard, Placement

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment

GRANULE = native.HUGE_PAGE
"""A device's share of the pool is a multiple of this many bytes."""
_LINE = 64


def expert_pool_bytes(
    deployment: Deployment, placement: Placement, *, given: int | None, weights: int | None
) -> int:
    """Returns the bytes of the expert pool over all devices: ``given``, or else what the other FFN
    weights of all models leave of ``weights``, the bytes of the weight pool; or else as many as all
    experts take. 0 where none are given and no model has experts on demand."""
    if given is not None or not placement.all_expert_bytes:
        return given or 0
    ranks = len(deployment.weight_pool_devices)
    if weights is None:
        share = -(-placement.all_expert_bytes // ranks)
        return ranks * -(-share // GRANULE) * GRANULE
    return ranks * (max(0, weights - placement.pool_bytes) // ranks // GRANULE) * GRANULE


def share_of(deployment: Deployment) -> int:
    """Returns the bytes of one device's share of the expert pool."""
    return deployment.expert_pool_bytes // len(deployment.weight_pool_devices) // GRANULE * GRANULE


def check_experts(
    deployment: Deployment, specs: Mapping[int, ModelSpec], placement: Placement
) -> None:
    """Raises ConfigError when experts cannot be in memory on demand: says for which reason, and
    what would be right."""
    for index, model in deployment.models.items():
        has_experts = any(isinstance(ffn, MoEFFN) for ffn in specs[index].ffn)
        if model.experts == "demand" and not has_experts:
            raise ConfigError(f"experts: {model.name} has no routed experts: give it experts: all")
    if deployment.expert_pool_bytes > deployment.weight_pool_bytes:
        raise ConfigError(
            f"expert_pool_bytes: {exact_size(deployment.expert_pool_bytes)} are more than "
            f"weight_pool_bytes, {exact_size(deployment.weight_pool_bytes)}, of which they are part"
        )
    on_demand = [i for i, model in deployment.models.items() if model.experts == "demand"]
    if not on_demand:
        return
    first = deployment.models[on_demand[0]].name
    if deployment.loop != "resident":
        raise ConfigError(
            f"experts: those of {first} are in memory on demand under the resident loop alone, "
            f"not under loop: {deployment.loop}"
        )
    ranks = len(deployment.weight_pool_devices)
    share = share_of(deployment)
    for of_rank in placement.shards:
        for index in on_demand:
            needed = largest_layer(specs[index], of_rank[index]) if index in of_rank else 0
            if needed > share:
                least = ranks * -(-needed // GRANULE) * GRANULE
                raise ConfigError(
                    f"expert_pool_bytes: {exact_size(deployment.expert_pool_bytes)} on {ranks} "
                    "device(s) do not hold the routed experts of one layer of "
                    f"{deployment.models[index].name}, which a long prompt needs together: give "
                    f"at least {exact_size(least)}"
                )


def largest_layer(spec: ModelSpec, shard: FFNShard) -> int:
    """Returns bytes of the routed experts of one layer on a rank in packed form, of the layer that
    has most; compact weights take less."""
    element = DTYPE_BYTES[spec.dtype]

    def matrix(columns: int, depth: int) -> int:
        elements = ns.round_up(columns, ns.PANEL) * ns.round_up(depth, ns.DEPTH)
        return ns.round_up(elements * element, _LINE)

    most = 0
    for ffn in spec.ffn:
        if isinstance(ffn, MoEFFN):
            whole = shard.parallel == "ep"
            width = ffn.intermediate if whole else shard.width(ffn.intermediate)
            one = matrix(2 * ns.round_up(width, ns.DEPTH), spec.hidden) + matrix(spec.hidden, width)
            most = max(most, len(shard.experts(ffn)) * one)
    return most
