"""The expert pool: the part of the weight pool for routed experts that are in memory on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import exact_size
from crosspool.kernels import native
from crosspool.kernels import native_structs as ns
from crosspool.models.registry import ffn_tensors
from crosspool.models.spec import ModelSpec, MoEFFN
from crosspool.weightpool.held_matrix import hold_codes
from crosspool.weightpool.placement import FFNShard, Placement, held_form

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
    most = 0
    for layer, ffn in enumerate(spec.ffn):
        held = shard.experts(ffn) if isinstance(ffn, MoEFFN) else range(0)
        if not held:
            continue
        key = f"experts.{held.start}."
        parts = {
            ref.key.removeprefix(key): (ref, shard.slice(ref, ffn))
            for ref in ffn_tensors(spec, layer)
            if ref.key.startswith(key)
        }
        (gate, index), (up, _), (down, down_index) = (
            parts[name] for name in ("gate", "up", "down")
        )
        if index is None or down_index is None:
            continue
        width = index[0].stop - index[0].start
        gate_up = _matrix(spec, 2 * ns.round_up(width, ns.DEPTH), spec.hidden)
        forms = {held_form(ref, spec.dtype, index) for ref in (gate, up)}
        if len(forms) == 1 and (form := forms.pop()) is not None:
            hold_codes(gate_up, form)
        packed_down = _matrix(spec, spec.hidden, width)
        if (form := held_form(down, spec.dtype, down_index)) is not None:
            hold_codes(packed_down, form)
        one = sum(ns.round_up(matrix.bytes, _LINE) for matrix in (gate_up, packed_down))
        most = max(most, len(held) * one)
    return most


def _matrix(spec: ModelSpec, n: int, k: int) -> ns.Matrix:
    return ns.Matrix(None, n, k, ns.BFLOAT16 if spec.dtype == "bfloat16" else ns.FLOAT32)
