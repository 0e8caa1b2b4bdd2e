"""Makes a deployment that can start from what the user asked for: reads the models, fills in what
was left open, and refuses what cannot work, before any process exists."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from msgspec.structs import asdict, replace

from crosspool.checks.front_end_arguments import check_model_arguments, check_server_arguments
from crosspool.checks.kv_bounds import check_kv_bounds
from crosspool.checks.models import check_engine, check_tensors, model_config
from crosspool.checks.tokenizer_files import check_tokenizer
from crosspool.cli.memory import available_bytes, check_memory, default_kv_bytes, memories
from crosspool.cli.network_links import own_address, settle_links
from crosspool.config.deployment import MAX_MODELS, ConfigError, Deployment, ModelConfig
from crosspool.config.gpu import (
    check_alike,
    check_kv_cache_dtype,
    check_loop,
    gpus_of,
    loop_of,
)
from crosspool.config.hosts import check_devices_of_hosts, check_hosts
from crosspool.config.options import Options
from crosspool.config.ports import free_port
from crosspool.config.urls import base_url, url_of
from crosspool.models.registry import specs_of
from crosspool.models.spec import ModelSpec
from crosspool.transport.host_messages import HostFacts
from crosspool.transport.links import check_reach
from crosspool.weightpool.experts import check_experts, expert_pool_bytes
from crosspool.weightpool.placement import Placement, place
from crosspool.weightpool.sleeping import check_sleeping

_EVERY_ADDRESS = ("", "0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A deployment that is ready to start (but for its runtime folder), and its models."""

    deployment: Deployment
    specs: dict[int, ModelSpec]
    """What is known of each model, by number."""
    placement: Placement


def facts_of_this_host(address: str) -> HostFacts:
    """Returns what this host has for its devices; ``address`` is its own."""
    return HostFacts(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        available_bytes=available_bytes(),
        address=address,
    )


def prepare(options: Options, others: Callable[[], Mapping[int, HostFacts]] = dict) -> Prepared:
    """Settles what the options leave open. ``others`` returns what the other hosts have, by their
    numbers, once all are there; it is called when nothing but that is missing.

    Raises ConfigError for the first thing that is wrong; it names the field and what would be
    right."""
    check_hosts(options)
    check_devices_of_hosts(options)
    models = model_configs(options)
    check_server_arguments(options.sglang)
    for model in models.values():
        check_model_arguments({**options.sglang, **model.sglang}, model)
    _check_chunks(options)
    _check_bodies(options)
    _check_grammar_backend(options)
    specs = specs_of(models)
    port = free_port(options.host, options.port)
    settled = {
        "models": models,
        "next_model": len(models),
        "kv_pool_bytes": options.kv_pool_bytes or 0,
        "weight_pool_bytes": sys.maxsize,
        "expert_pool_bytes": 0,
        "port": port,
        **_router(options, port),
    }
    deployment = Deployment(**{**asdict(options), **settled})
    check_alike(deployment.devices)
    check_kv_cache_dtype(deployment)
    check_reach(deployment)
    gpus = gpus_of(deployment.devices)
    deployment = replace(deployment, loop=loop_of(deployment, gpus))
    check_loop(deployment)
    for number, model in models.items():
        check_engine(model, specs[number], deployment.devices)
    address = own_address(deployment.host_address) if options.nnodes > 1 else "127.0.0.1"
    hosts = {deployment.node_rank: facts_of_this_host(address), **others()}
    check_cores(deployment, hosts)
    deployment = replace(deployment, network_links=settle_links(deployment, specs, hosts))
    found = memories(deployment.devices, gpus, hosts)
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
        model = model_config(given, options, f"models[{number}].")
        if model.name in {earlier.name for earlier in models.values()}:
            raise ConfigError(
                f"two models are named {model.name!r}: give each a name of its own, with "
                "--served-model-name or with the key `name` of the file"
            )
        models[number] = model
    return models


def check_cores(deployment: Deployment, hosts: Mapping[int, HostFacts]) -> None:
    """Raises ConfigError where a device has cores that its host has not. ``hosts``: what each host
    has, by its number."""
    pools = (
        ("kv_pool_devices", deployment.kv_pool_devices),
        ("weight_pool_devices", deployment.weight_pool_devices),
    )
    for field, devices in pools:
        for device in devices:
            named = device.named_cores if device.is_cpu else None
            if missing := set(named or ()) - set(hosts[device.node].cores):
                raise ConfigError(
                    f"{field}: {device.name}: cores {sorted(missing)} are not available to its "
                    "process"
                )


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


def _router(options: Options, port: int) -> dict[str, str]:
    """Returns the URLs of the router and, for it, of the server, which listens on ``port``; empty
    where there is no router. Raises ConfigError."""
    if options.router_url is None:
        for name in ("advertise_url", "router_api_key"):
            if getattr(options, name) is not None:
                raise ConfigError(f"{name}: it says something to a router: give router_url, too")
        return {}
    key = options.router_api_key or ""
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("router_api_key: it must have printable ASCII characters alone")
    router_url = base_url("router_url", options.router_url)
    if options.advertise_url is not None:
        advertise_url = base_url("advertise_url", options.advertise_url)
    elif options.host in _EVERY_ADDRESS:
        raise ConfigError(
            f"advertise_url is missing: host {options.host} is every address of this machine, and "
            "a router needs one: give --advertise-url http://HOST:PORT"
        )
    else:
        advertise_url = url_of(options.host, port)
    return {"router_url": router_url, "advertise_url": advertise_url}
