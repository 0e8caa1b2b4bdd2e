"""From what the user wrote to a deployment that can start: reads the models, fills in what was
left open, and refuses what cannot work, before any process exists."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec

from crosspool.cli.memory import check_memory, default_kv_bytes, memories
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.draft import Draft, ModelDraft, devices_of, size_of
from crosspool.config.gpu import check_alike, check_loop
from crosspool.config.sizes import format_size
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout
from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.spec import ModelSpec
from crosspool.weightpool.checkpoint import Checkpoint
from crosspool.weightpool.placement import Placement, place

_HUGE_PAGE = 2 << 20


_SAME = (
    "ffn_parallel",
    "loop",
    "gpu_links",
    "lanes",
    "lease_steps",
    "page_size",
    "chunked_prefill_size",
    "tbt_target_ms",
    "max_running_requests",
    "max_queued_requests",
    "queue_timeout",
    "promise",
    "growth_tokens",
    "prefix_cache",
    "watchdog_timeout",
    "failure_grace",
    "drain_timeout",
    "random_seed",
    "host",
    "sglang",
)
"""Fields that a deployment takes from its draft as they are."""
_NAME = re.compile(r"[\w.:+-]+(/[\w.:+-]+)*")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A deployment ready to start (but for its runtime folder), and its models in order."""

    deployment: Deployment
    specs: tuple[ModelSpec, ...]
    placement: Placement


def prepare(draft: Draft) -> Prepared:
    """Raises ConfigError for the first thing that is wrong: the field, and what would be right."""
    _check_numbers(draft)
    kv_devices = devices_of(draft.kv_pool_devices, "kv_pool_devices")
    weight_devices = devices_of(draft.weight_pool_devices, "weight_pool_devices")
    models, specs = _read_models(draft, weight_devices)
    chunk_bytes = size_of(draft.chunk_bytes, "chunk_bytes")
    if chunk_bytes % _HUGE_PAGE:
        raise ConfigError(f"chunk_bytes: {chunk_bytes} must be a multiple of 2MiB")
    deployment = Deployment(
        models=models,
        kv_pool_devices=kv_devices,
        weight_pool_devices=weight_devices,
        kv_pool_bytes=(
            0 if draft.kv_pool_bytes is None else size_of(draft.kv_pool_bytes, "kv_pool_bytes")
        ),
        weight_pool_bytes=(
            sys.maxsize
            if draft.weight_pool_bytes is None
            else size_of(draft.weight_pool_bytes, "weight_pool_bytes")
        ),
        chunk_bytes=chunk_bytes,
        port=_free_port(draft.host, draft.port),
        **{name: getattr(draft, name) for name in _SAME},
    )
    check_alike(deployment.devices)
    check_loop(deployment)
    found = memories(deployment.devices)
    if draft.kv_pool_bytes is None:
        unbounded = place(msgspec.structs.replace(deployment, weight_pool_bytes=sys.maxsize), specs)
        kv_pool_bytes = default_kv_bytes(deployment, specs, unbounded, found)
        deployment = msgspec.structs.replace(deployment, kv_pool_bytes=kv_pool_bytes)
    _check_kv_bounds(deployment, specs)
    placement = place(deployment, specs)
    if draft.weight_pool_bytes is None:
        deployment = msgspec.structs.replace(deployment, weight_pool_bytes=placement.pool_bytes)
    check_memory(deployment, specs, placement, found)
    _check_tensors(models, specs)
    return Prepared(deployment=deployment, specs=specs, placement=placement)


def _check_numbers(draft: Draft) -> None:
    for field, least in (
        ("lanes", 1),
        ("lease_steps", 1),
        ("page_size", 1),
        ("chunked_prefill_size", 1),
        ("tbt_target_ms", 0),
        ("max_running_requests", 1),
        ("max_queued_requests", 0),
        ("growth_tokens", 1),
        ("queue_timeout", 0),
        ("watchdog_timeout", 1),
        ("failure_grace", 0),
        ("drain_timeout", 0),
    ):
        if getattr(draft, field) < least:
            raise ConfigError(f"{field}: {getattr(draft, field)} must be at least {least}")
    if not 0 <= draft.port <= 65535:
        raise ConfigError(f"port: {draft.port} must be between 1 and 65535, or 0 for any free one")


def _read_models(
    draft: Draft, weight_devices: Sequence[Device]
) -> tuple[tuple[ModelConfig, ...], tuple[ModelSpec, ...]]:
    if not draft.models:
        raise ConfigError("models: name at least one")
    models = tuple(
        _model_config(model, _own_devices(model, f"models[{index}]", weight_devices))
        for index, model in enumerate(draft.models)
    )
    for index, model in enumerate(models):
        if model.name in {earlier.name for earlier in models[:index]}:
            raise ConfigError(
                f"two models are named {model.name!r}: give each its own with --served-model-name"
            )
    specs = tuple(
        read_model(Path(model.path), model.context_length, model.dtype) for model in models
    )
    return models, specs


def _check_tensors(models: Sequence[ModelConfig], specs: Sequence[ModelSpec]) -> None:
    """Every tensor is there with its shape: a device would find out only after it has loaded the
    models before."""
    for path, spec in {Path(m.path): spec for m, spec in zip(models, specs, strict=True)}.items():
        layers = (ffn_tensors(spec, layer) for layer in range(spec.layers))
        attention = (ref for _, ref in attention_tensors(spec))
        Checkpoint(path).check(chain(attention, chain.from_iterable(layers)))


def _own_devices(
    draft: ModelDraft, where: str, pool: Sequence[Device]
) -> tuple[Device, ...] | None:
    """Devices of the weight pool that the model names for itself."""
    if draft.weight_pool_devices is None:
        return None
    key = f"{where}.weight_pool_devices"
    own = devices_of(draft.weight_pool_devices, key)
    for device in own:
        if device not in pool:
            known = ", ".join(device.name for device in pool)
            raise ConfigError(f"{key}: {device.name} is none of weight_pool_devices: {known}")
    return own


def _model_config(draft: ModelDraft, weight_devices: tuple[Device, ...] | None) -> ModelConfig:
    folder = Path(draft.path).absolute()
    if not folder.is_dir():
        raise ConfigError(f"model path {draft.path}: no such folder (models are local folders)")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model path {draft.path}: there is no config.json in it")
    name = folder.name if draft.name is None else draft.name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"model name {name!r}: use letters, digits and . _ : + - /")
    return ModelConfig(
        name=name,
        path=str(folder),
        sglang=draft.sglang,
        context_length=draft.context_length,
        dtype=draft.dtype,
        kv_floor_bytes=_own_size(draft.kv_floor_bytes, f"{name}: kv_floor_bytes") or 0,
        kv_ceiling_bytes=_own_size(draft.kv_ceiling_bytes, f"{name}: kv_ceiling_bytes"),
        weight_pool_devices=weight_devices,
    )


def _own_size(value: int | str | None, key: str) -> int | None:
    return None if value is None else size_of(value, key)


def _check_kv_bounds(d: Deployment, specs: Sequence[ModelSpec]) -> None:
    """Floors fit together, and one request as long as each model's context fits into what its
    promises can reach on one attention rank."""
    bounds, ranks = Bounds.of(d), len(d.kv_pool_devices)
    if sum(bounds.floors) > bounds.budget:
        floors = sum(bounds.floors) * d.chunk_bytes * ranks
        raise ConfigError(
            f"kv_floor_bytes: the floors of all models come to {format_size(floors)} in whole "
            f"chunks, more than the KV pool's {format_size(d.kv_pool_bytes)}: lower them or give "
            "a larger --kv-pool-bytes"
        )
    for index, (model, spec) in enumerate(zip(d.models, specs, strict=True)):
        layout = KVLayout(spec, d.page_size, d.chunk_bytes)
        chunks = -(-layout.pages_for(spec.context) * layout.page_bytes // layout.chunk_bytes)
        if bounds.ceilings[index] < bounds.floors[index]:
            raise ConfigError(
                f"kv_ceiling_bytes of {model.name}: {model.kv_ceiling_bytes} is below its "
                f"kv_floor_bytes, {model.kv_floor_bytes} (in whole chunks of each device)"
            )
        if chunks > bounds.reach(index):
            raise ConfigError(_too_long(d, index, spec, layout))


def _too_long(d: Deployment, index: int, spec: ModelSpec, layout: KVLayout) -> str:
    """Why one request of the model's context does not fit, and what would make it."""
    bounds, model, ranks = Bounds.of(d), d.models[index], len(d.kv_pool_devices)
    name = model.name
    chunks = -(-layout.pages_for(spec.context) * layout.page_bytes // layout.chunk_bytes)
    needed = chunks * d.chunk_bytes * ranks
    tokens = layout.pages_in(bounds.reach(index)) * layout.page_size
    shorter = f"--context-length {tokens}, or " if tokens else ""
    request = f"do not hold one request of {spec.context} tokens, the context of {name}"
    if chunks > bounds.ceilings[index] and model.kv_ceiling_bytes is not None:
        return (
            f"kv_ceiling_bytes of {name}: {format_size(model.kv_ceiling_bytes)} on {ranks} "
            f"device(s) {request}: give {shorter}a ceiling of {needed} ({format_size(needed)})"
        )
    others = (sum(bounds.floors) - bounds.floors[index]) * d.chunk_bytes * ranks
    beside = f" beside the floors of other models, {format_size(others)}," if others else ""
    needed += others
    return (
        f"kv_pool_bytes: {format_size(d.kv_pool_bytes)} on {ranks} device(s){beside} {request}: "
        f"give {shorter}--kv-pool-bytes {needed} ({format_size(needed)})"
    )


def _free_port(host: str, port: int) -> int:
    """``port`` if nothing listens there, or any free one for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host}: {error.strerror}; choose --port") from None
        return int(probe.getsockname()[1])
