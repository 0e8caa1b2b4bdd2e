"""Writes a plan as the deployment file that ``crosspool serve --config`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size
from crosspool.models.registry import read_model
from crosspool.planner.request import PlanRequest
from crosspool.planner.result import Plan

_PROMISES = {"active": "growth", "promised": "worst_case"}
"""The server's promise that matches each charge of a plan."""


def device_names(count: int, given: Sequence[str] | None) -> list[str]:
    """Returns the user's names, or GPUs by number. Raises ConfigError when their number differs."""
    if given is None:
        return [f"cuda:{number}" for number in range(count)]
    if len(given) != count:
        raise ConfigError(
            f"device names: {len(given)} for {count} device(s): give one name for each device"
        )
    return list(given)


def kv_pool_bytes(request: PlanRequest, plan: Plan) -> int:
    """Returns the page budget, but on each device at least one longest request of any model, since
    the server refuses a model whose context does not fit its budget, and at most the KV memory."""
    longest = max(model.longest_bytes for model in plan.budget.models)
    each = max(plan.budget.rank_bytes, longest)
    there = plan.kv_bytes // plan.kv_devices // request.chunk_bytes * request.chunk_bytes
    return plan.kv_devices * min(each, there)


def deployment_yaml(
    request: PlanRequest, plan: Plan, folders: Mapping[str, Path], names: Sequence[str]
) -> str:
    """Returns the file's text for the models' checkpoint ``folders`` and the devices' ``names``,
    the KV pool's first. Raises ConfigError for a model without a folder, or of a family that the
    server does not run."""
    for model in plan.models:
        if model.name not in folders:
            raise ConfigError(
                f"--yaml: {model.name} comes from the catalogue and has no checkpoint folder: "
                f"give --model-path {model.name}=DIR"
            )
        read_model(folders[model.name])
    kv = list(names[: plan.kv_devices])
    first = 0 if plan.shared_device else plan.kv_devices
    weight = list(names[first : first + plan.weight_devices])
    models = []
    for asked, model in zip(request.models, plan.models, strict=True):
        entry: dict[str, Any] = {"path": str(folders[model.name].absolute()), "name": model.name}
        if model.context < asked.shape.context:
            entry["context_length"] = model.context
        if asked.shape.kv_cache_dtype != "auto":
            entry["kv_cache_dtype"] = asked.shape.kv_cache_dtype
        if len(model.weight_devices) < len(weight):
            entry["weight_pool_devices"] = [weight[number] for number in model.weight_devices]
        models.append(entry)
    data: dict[str, Any] = {
        "models": models,
        "kv_pool_devices": kv,
        "weight_pool_devices": weight,
        "kv_pool_bytes": kv_pool_bytes(request, plan),
        "promise": _PROMISES[plan.charge],
        "page_size": request.page_size,
        "chunk_bytes": request.chunk_bytes,
    }
    if request.models_sleep:
        data["weight_pool_bytes"] = request.weight_pool_bytes
        data["residency_quantum"] = request.residency_quantum
    for field in ("page_size", "chunk_bytes", "residency_quantum"):
        if data.get(field) == getattr(PlanRequest, field):
            del data[field]
    head = (
        f"# crosspool plan: P{100 * plan.quantile:g} of KV demand at "
        f"{plan.rate:.4g} requests/s is {format_size(plan.budget.demand.value)}\n"
    )
    return head + yaml.safe_dump(data, sort_keys=False)
