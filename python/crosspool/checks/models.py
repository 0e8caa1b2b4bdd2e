"""What is checked of one model before a server takes it, at its start or while it runs: its folder
and name, its arguments for SGLang, its tokenizer, and the tensors of its checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from crosspool.checks.front_end_arguments import check_model_arguments
from crosspool.checks.kv_bounds import check_kv_bounds
from crosspool.checks.tokenizer_files import check_tokenizer
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.options import ModelOptions, ServerOptions
from crosspool.config.process import allow_descriptors
from crosspool.models.gguf_header import gguf_files
from crosspool.models.gpu_features import check_features
from crosspool.models.registry import attention_tensors, ffn_tensors, spec_of
from crosspool.models.spec import ModelSpec
from crosspool.weightpool.gguf_checkpoint import open_checkpoint

log = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


def model_config(options: ModelOptions, server: ServerOptions, where: str = "") -> ModelConfig:
    """Returns the model with its name and absolute path. ``where`` is what stands before a key in
    messages. Raises ConfigError."""
    folder = Path(options.path).absolute()
    files = gguf_files(folder)
    if not files and not folder.is_dir():
        raise ConfigError(
            f"model path {options.path}: no such folder (models are local folders, or GGUF files)"
        )
    if not files and not (folder / "config.json").is_file():
        raise ConfigError(f"model path {options.path}: there is no config.json in this folder")
    name = folder.name.removesuffix(".gguf") if options.name is None else options.name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"model name {name!r}: a name consists of letters, digits and . _ + - /")
    _check_devices(options, server, where)
    return ModelConfig(**{**asdict(options), "name": name, "path": str(folder)})


def _check_devices(options: ModelOptions, server: ServerOptions, where: str) -> None:
    """Raises ConfigError for devices of a model that are not those of a pool, and for what a model
    cannot have that is served by some devices of the KV pool alone."""
    for pool in ("kv_pool_devices", "weight_pool_devices"):
        own, of_server = getattr(options, pool), getattr(server, pool)
        known = ", ".join(device.name for device in of_server)
        for device in own or ():
            if device not in of_server:
                raise ConfigError(f"{where}{pool}: {device.name} is none of {pool}: {known}")
    if options.kv_pool_devices is None:
        return
    for device in options.kv_pool_devices:
        if not device.is_cpu:
            raise ConfigError(
                f"{where}kv_pool_devices: {device.name}: every GPU of the KV pool serves all "
                "models: leave it out"
            )
    for bound in ("kv_floor_bytes", "kv_ceiling_bytes"):
        if getattr(options, bound):
            raise ConfigError(
                f"{where}{bound}: this is a share of every device of the KV pool, and "
                "kv_pool_devices gives the model some of them: give one of the two"
            )


def check_further_model(options: ModelOptions, deployment: Deployment) -> ModelConfig:
    """Checks a model that is to be served beside those of a running ``deployment``, and returns it
    with its name and absolute path. It reads the headers of the checkpoint's files, which can take
    seconds. Whether its weights fit into the pools is not looked at.

    Raises ConfigError that names what is wrong and what would be right."""
    model = model_config(options, deployment)
    check_name(model.name, [other.name for other in deployment.models.values()])
    allow_descriptors(len(deployment.models) + 1)
    check_model(model, deployment.sglang)
    number, spec = deployment.free_number(), spec_of(model)
    check_engine(model, spec, deployment.devices)
    check_kv_bounds(deployment.with_model(number, model), {number: spec})
    check_tensors(model, spec)
    return model


def check_other_weights(
    options: ModelOptions, old: ModelConfig, deployment: Deployment
) -> ModelConfig:
    """Checks a checkpoint that is to be served in the place of that of ``old``, and returns it with
    its absolute path. It reads the headers of the checkpoint's files, which can take seconds.

    Raises ConfigError that names what is wrong, also where it has other shapes."""
    model = model_config(options, deployment)
    check_model(model, deployment.sglang)
    spec = spec_of(model)
    if spec != spec_of(old):
        raise ConfigError(
            f"model path {model.path}: this is another model than that in {old.path}; only a "
            "checkpoint of the same shapes can take its place. Load it as a model of its own"
        )
    check_tensors(model, spec)
    return model


def check_name(name: str, others: Collection[str]) -> None:
    """Raises ConfigError when another model has the name."""
    if name in others:
        raise ConfigError(f"name: another model is named {name!r}: give this one a name of its own")


def check_model(model: ModelConfig, server: Mapping[str, Any]) -> None:
    """Checks a model's arguments for SGLang, which go before those of the ``server``, and its
    tokenizer. Raises ConfigError."""
    arguments = {**server, **model.sglang}
    check_model_arguments(arguments, model)
    check_tokenizer(model, arguments)


def check_engine(model: ModelConfig, spec: ModelSpec, devices: Sequence[Device]) -> None:
    """Raises ConfigError for a model that the engine of the devices does not compute."""
    if any(not device.is_cpu for device in devices):
        check_features(model, spec)


def check_tensors(model: ModelConfig, spec: ModelSpec) -> None:
    """Raises ConfigError when a checkpoint lacks a tensor or has it in another shape. A device
    would find out only after it had loaded the models before this one. Warns of weights in a dtype
    that the model's cannot hold."""
    layers = (ffn_tensors(spec, layer) for layer in range(spec.layers))
    attention = (ref for _, ref in attention_tensors(spec))
    dtypes = open_checkpoint(Path(model.path)).check(chain(attention, chain.from_iterable(layers)))
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
