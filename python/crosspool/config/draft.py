"""What a user wrote, in flags or in a file, before models were read and defaults filled in."""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal

import msgspec

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device, parse_devices
from crosspool.config.sizes import parse_size


class ModelDraft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model as asked for; fields as in ModelConfig."""

    path: str
    name: str | None = None
    """None: the last part of ``path``."""
    context_length: int | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    weight_pool_devices: str | list[str] | None = None
    kv_floor_bytes: int | str | None = None
    kv_ceiling_bytes: int | str | None = None
    sglang: dict[str, Any] = {}


_defaults = {field.name: field.default for field in msgspec.structs.fields(Deployment)}


class Draft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment as asked for; fields as in Deployment, with its defaults."""

    models: list[ModelDraft]
    kv_pool_devices: str | list[str] = "cpu"
    weight_pool_devices: str | list[str] = "cpu"
    kv_pool_bytes: int | str | None = None
    """None: a share of the memory that is available (see cli.prepare)."""
    weight_pool_bytes: int | str | None = None
    """None: what the models' FFN weights need."""
    ffn_parallel: Literal["tp", "ep"] = _defaults["ffn_parallel"]
    loop: Literal["host", "resident"] = _defaults["loop"]
    gpu_links: Literal["peer", "nvshmem"] = _defaults["gpu_links"]
    lanes: int = _defaults["lanes"]
    lease_steps: int = _defaults["lease_steps"]
    page_size: int = _defaults["page_size"]
    chunk_bytes: int | str = _defaults["chunk_bytes"]
    chunked_prefill_size: int = _defaults["chunked_prefill_size"]
    tbt_target_ms: float = _defaults["tbt_target_ms"]
    max_running_requests: int = _defaults["max_running_requests"]
    max_queued_requests: int = _defaults["max_queued_requests"]
    queue_timeout: float = _defaults["queue_timeout"]
    promise: Literal["worst_case", "growth"] = _defaults["promise"]
    growth_tokens: int = _defaults["growth_tokens"]
    prefix_cache: bool = _defaults["prefix_cache"]
    watchdog_timeout: float = _defaults["watchdog_timeout"]
    failure_grace: float = _defaults["failure_grace"]
    drain_timeout: float = _defaults["drain_timeout"]
    random_seed: int | None = None
    host: str = _defaults["host"]
    port: int = _defaults["port"]
    sglang: dict[str, Any] = {}


_WHERE = r"(?: - at `(?:key` in `)?\$\.?(?P<where>[^`]*)`)?"
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`" + _WHERE)
_MISSING = re.compile(r"Object missing required field `(?P<key>[^`]*)`" + _WHERE)
_WRONG = re.compile(r"(?P<problem>.*?)" + _WHERE)


def to_draft(data: Any, source: str) -> Draft:
    """Turns parsed YAML or collected flags into a Draft.

    Raises ConfigError that names ``source``, the key, and what would be right."""
    try:
        return msgspec.convert(data, Draft)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error))}") from None


def _explain(message: str) -> str:
    if match := _UNKNOWN.fullmatch(message):
        key, where = match.group("key"), match.group("where") or ""
        known = (ModelDraft if where.startswith("models") else Draft).__struct_fields__
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {_join(where, key)} ({hint})"
    if match := _MISSING.fullmatch(message):
        return f"{_join(match.group('where') or '', match.group('key'))} is missing"
    match = _WRONG.fullmatch(message)
    assert match is not None
    return f"{match.group('where') or 'top level'}: {match.group('problem')}"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def size_of(value: int | str, key: str) -> int:
    """Parses the size under ``key``; raises ConfigError that names it."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def devices_of(value: str | list[str], key: str) -> tuple[Device, ...]:
    """Parses the devices under ``key``; raises ConfigError that names it."""
    try:
        return parse_devices(value if isinstance(value, str) else ",".join(value))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
