"""Makes a deployment that can start from what the user asked for: reads the models, fills in what
was left open, and refuses what cannot work, before any process exists."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from msgspec.structs import asdict, replace

from crosspool.checks.front_end_arguments import check_model_arguments, check_server_arguments
from crosspool.checks.kv_bounds import check_kv_bounds
from crosspool.checks.models import check_engine, check_tensors, model_config
from crosspool.checks.tokenizer_files import check_tokenizer
from crosspool.cli.memory import check_memory, default_kv_bytes, memories
from crosspool.config.deployment import MAX_MODELS, ConfigError, Deployment, ModelConfig
from crosspool.config.gpu import (
    check_alike,
    check_kv_cache_dtype,
    check_loop,
    gpus_of,
    loop_of,
)
from crosspool.config.options import Options
from crosspool.models.registry import specs_of
from crosspool.models.spec import ModelSpec
from crosspool.weightpool.experts import check_experts, expert_pool_bytes
from crosspool.weightpool.placement import Placement, place
from crosspool.weightpool.sleeping import check_sleeping


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A deployment that is ready to start (but for its runtime folder), and its models."""

    deployment: Deployment
    specs: dict[int, ModelSpec]
    """What is known of each model, by number."""
    placement: Placement


def prepare(options: Options) -> Prepared:
    """Settles what the options leave open.

    Raises ConfigError for the first thing that is wrong; it names the field and what would be
    right."""
    models = model_configs(options)
    check_server_arguments(options.sglang)
    for model in models.values():
        check_model_arguments({**options.sglang, **model.sglang}, model)
    _check_chunks(options)
    _check_bodies(options)
    _check_grammar_backend(options)
    specs = specs_of(models)
    settled = {
        "models": models,
        "next_model": len(models),
        "kv_pool_bytes": options.kv_pool_bytes or 0,
        "weight_pool_bytes": sys.maxsize,
        "expert_pool_bytes": 0,
        "port": _free_port(options.host, options.port),
    }
    deployment = Deployment(**{**asdict(options), **settled})
    check_alike(deployment.devices)
    check_kv_cache_dtype(deployment)
    gpus = gpus_of(deployment.devices)
    deployment = replace(deployment, loop=loop_of(deployment, gpus))
    check_loop(deployment)
    for number, model in models.items():
        check_engine(model, specs[number], deployment.devices)
    found = memories(deployment.devices, gpus)
    placement = place(deployment, specs)
    if options.kv_pool_bytes is None:
        kv_pool_bytes = default_kv_bytes(deployment, placement, found)
        deployment = replace(deployment, kv_pool_bytes=kv_pool_bytes)
    check_kv_bounds(deployment, specs)
    expert_bytes = expert_pool_bytes(
        *(deployment, placement),
        given=options.expert_pool_bytes,
        weights=options.weight_pool_bytes,
    )
    weight_pool_bytes = options.weight_pool_bytes or placement.pool_bytes + expert_bytes
    deployment = replace(
        deployment, weight_pool_bytes=weight_pool_bytes, expert_pool_bytes=expert_bytes
    )
    check_experts(deployment, specs, placement)
    placement = place(deployment, specs)  # raises ConfigError where the weight pool is too small
    check_sleeping(deployment, placement)
    check_memory(deployment, placement, found)
    for model in models.values():
        check_tokenizer(model, {**options.sglang, **model.sglang})
    for number in {model.path: number for number, model in models.items()}.values():
        check_tensors(models[number], specs[number])
    return Prepared(deployment=deployment, specs=specs, placement=placement)


def model_configs(options: Options) -> dict[int, ModelConfig]:
    """Returns the models with their names and absolute paths, by number. Raises ConfigError."""
    if not options.models:
        raise ConfigError("models: name at least one model")
    if len(options.models) > MAX_MODELS:
        raise ConfigError(
            f"models: there are {len(options.models)}, and at most {MAX_MODELS} can be served at "
            "a time"
        )
    models: dict[int, ModelConfig] = {}
    for number, given in enumerate(options.models):
        model = model_config(given, options.weight_pool_devices, f"models[{number}].")
        if model.name in {earlier.name for earlier in models.values()}:
            raise ConfigError(
                f"two models are named {model.name!r}: give each a name of its own, with "
                "--served-model-name or with the key `name` of the file"
            )
        models[number] = model
    return models


def _check_chunks(options: Options) -> None:
    """Raises ConfigError where a prompt chunk is no whole number of pages, as SGLang asks for."""
    size, page = options.chunked_prefill_size, options.page_size
    if size % page:
        below = size // page * page
        ways = f"{below} or {below + page}" if below else f"{page}"
        raise ConfigError(
            f"chunked_prefill_size: {size} must be a multiple of page_size, {page}: give {ways}, "
            "or another --page-size"
        )


def _check_grammar_backend(options: Options) -> None:
    """Raises ConfigError where the library is an extra that is not installed."""
    backend = options.sglang.get("grammar_backend")
    if backend == "llguidance" and find_spec(backend) is None:
        raise ConfigError(
            f"grammar_backend: {backend} is not installed; pip install 'crosspool[{backend}]'"
        )


def _check_bodies(options: Options) -> None:
    """Raises ConfigError where a body that is allowed would never find room."""
    largest, total = options.max_body_bytes, options.max_total_body_bytes
    if largest > total:
        raise ConfigError(
            f"max_total_body_bytes: {total} bytes must not be less than max_body_bytes, {largest}"
        )


def _free_port(host: str, port: int) -> int:
    """Returns ``port`` if nothing listens there, or any free port for 0; else raises
    ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host}: {error.strerror}; choose another --port or --host"
            ) from None
        return int(probe.getsockname()[1])
