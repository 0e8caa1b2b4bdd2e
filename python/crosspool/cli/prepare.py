"""Makes a deployment that can start from what the user asked for: reads the models, fills in what
was left open, and refuses what cannot work, before any process exists."""

from __future__ import annotations

import logging
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from msgspec.structs import asdict, replace

from crosspool.cli.front_end_arguments import check_front_end
from crosspool.cli.memory import check_kv_bounds, check_memory, default_kv_bytes, memories
from crosspool.cli.tokenizer_files import check_tokenizer
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.gpu import check_alike, check_loop, gpus_of, loop_of
from crosspool.config.options import ModelOptions, Options
from crosspool.models.gguf_header import gguf_files
from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.spec import ModelSpec
from crosspool.weightpool.gguf_checkpoint import open_checkpoint
from crosspool.weightpool.placement import Placement, place
from crosspool.weightpool.sleeping import check_sleeping

log = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A deployment that is ready to start (but for its runtime folder), and its models in order."""

    deployment: Deployment
    specs: tuple[ModelSpec, ...]
    placement: Placement


def prepare(options: Options) -> Prepared:
    """Settles what the options leave open.

    Raises ConfigError for the first thing that is wrong; it names the field and what would be
    right."""
    models = model_configs(options)
    check_front_end(options.sglang, models)
    _check_chunks(options)
    _check_bodies(options)
    _check_grammar_backend(options)
    for model in models:
        _check_served(model)
    specs = tuple(
        read_model(Path(model.path), model.context_length, model.dtype) for model in models
    )
    settled = {
        "models": models,
        "kv_pool_bytes": options.kv_pool_bytes or 0,
        "weight_pool_bytes": sys.maxsize,
        "port": _free_port(options.host, options.port),
    }
    deployment = Deployment(**{**asdict(options), **settled})
    check_alike(deployment.devices)
    gpus = gpus_of(deployment.devices)
    deployment = replace(deployment, loop=loop_of(deployment, gpus))
    check_loop(deployment)
    found = memories(deployment.devices, gpus)
    placement = place(deployment, specs)
    if options.kv_pool_bytes is None:
        kv_pool_bytes = default_kv_bytes(deployment, placement, found)
        deployment = replace(deployment, kv_pool_bytes=kv_pool_bytes)
    check_kv_bounds(deployment, specs)
    weight_pool_bytes = options.weight_pool_bytes or placement.pool_bytes
    deployment = replace(deployment, weight_pool_bytes=weight_pool_bytes)
    placement = place(deployment, specs)  # raises ConfigError where the weight pool is too small
    check_sleeping(deployment, placement)
    check_memory(deployment, placement, found)
    for model in models:
        check_tokenizer(model, {**options.sglang, **model.sglang})
    _check_tensors(models, specs)
    return Prepared(deployment=deployment, specs=specs, placement=placement)


def model_configs(options: Options) -> tuple[ModelConfig, ...]:
    """Returns the models with their names and absolute paths. Raises ConfigError."""
    if not options.models:
        raise ConfigError("models: name at least one model")
    models = tuple(
        _model_config(model, f"models[{index}]", options.weight_pool_devices)
        for index, model in enumerate(options.models)
    )
    for index, model in enumerate(models):
        if model.name in {earlier.name for earlier in models[:index]}:
            raise ConfigError(
                f"two models are named {model.name!r}: give each a name of its own, with "
                "--served-model-name or with the key `name` of the file"
            )
    return models


def _model_config(options: ModelOptions, where: str, pool: Sequence[Device]) -> ModelConfig:
    folder = Path(options.path).absolute()
    if not folder.is_dir():
        raise ConfigError(f"model path {options.path}: no such folder (models are local folders)")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model path {options.path}: there is no config.json in this folder")
    name = folder.name if options.name is None else options.name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"model name {name!r}: a name consists of letters, digits and . _ + - /")
    for device in options.weight_pool_devices or ():
        if device not in pool:
            known = ", ".join(device.name for device in pool)
            key = f"{where}.weight_pool_devices"
            raise ConfigError(f"{key}: {device.name} is none of weight_pool_devices: {known}")
    return ModelConfig(**{**asdict(options), "name": name, "path": str(folder)})


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


def _check_served(model: ModelConfig) -> None:
    """Raises ConfigError for a GGUF model: ranks can read it, the front end cannot."""
    if gguf_files(Path(model.path)):
        raise ConfigError(
            f"{model.name}: {model.path}: GGUF files cannot be served yet, since their tokenizers "
            "are not read: name a checkpoint folder in Hugging Face format"
        )


def _check_tensors(models: Sequence[ModelConfig], specs: Sequence[ModelSpec]) -> None:
    """Raises ConfigError when a checkpoint lacks a tensor or has it in another shape. A device
    would find out only after it had loaded the models before this one. Warns of weights in a dtype
    that the model's cannot hold."""
    named = {model.path: (model, spec) for model, spec in zip(models, specs, strict=True)}
    for path, (model, spec) in named.items():
        layers = (ffn_tensors(spec, layer) for layer in range(spec.layers))
        attention = (ref for _, ref in attention_tensors(spec))
        dtypes = open_checkpoint(Path(path)).check(chain(attention, chain.from_iterable(layers)))
        halves = [name for name, dtype in dtypes.items() if dtype == "F16"]
        if halves and spec.dtype == "bfloat16":
            log.warning(
                "%s: %d of %d tensors are float16, such as %s, and lose 3 bits of precision as "
                "bfloat16: serve them with --dtype float32, or convert the checkpoint",
                model.name,
                len(halves),
                len(dtypes),
                halves[0],
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
