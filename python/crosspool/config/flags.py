"""The server's command line: SGLang's flags and the pools', parsed into a Draft."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from crosspool.config.deployment import ConfigError
from crosspool.config.draft import Draft, to_draft
from crosspool.config.sglang_flags import BY_NAME, FLAGS, SGLangFlag, reason_refused

EXAMPLES = """\
examples:
  # two models, both pools on all cores of this machine
  python -m crosspool.launch_server --model-path models/qwen --model-path models/deepseek

  # pools on cores of their own, budgets in bytes, names of our choice
  python -m crosspool.launch_server \\
      --model-path models/qwen     --served-model-name qwen \\
      --model-path models/deepseek --served-model-name deepseek \\
      --kv-pool-devices cpu:0-7 --weight-pool-devices cpu:8-15 \\
      --kv-pool-bytes 8GiB --weight-pool-bytes 60GiB --port 30000

Flags marked "per model" are given once for all models, or once per model in the order of
--model-path. For anything less regular, write a file: crosspool serve --config deployment.yaml
"""

_POOL_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("kv_pool_devices", str, "devices of attention and KV cache: cpu, or cpu:0-7,cpu:8-15"),
    ("weight_pool_devices", str, "devices of the FFN weights; the same device may be in both"),
    ("kv_pool_bytes", str, "KV cache budget of all KV devices together (2GiB, 512MiB, 1.5GB)"),
    ("weight_pool_bytes", str, "FFN weight budget of all weight devices together"),
    ("ffn_parallel", str, "how weight devices share a layer: tp splits every expert, ep deals"),
    ("loop", str, "what drives the layers: resident (native threads, default) or host (Python)"),
    ("gpu_links", str, "between GPUs: peer (each other's memory, default) or nvshmem"),
    ("lanes", int, "batches in flight per KV device"),
    ("lease_steps", int, "decode steps in a row at most for one batch (resident loop; default 32)"),
    (
        "tbt_target_ms",
        float,
        "time between tokens over which prompts read meanwhile should not push other requests' "
        "(default 50; 0: steps always take --chunked-prefill-size)",
    ),
    ("chunk_bytes", str, "unit of physical KV memory; a multiple of 2MiB"),
    ("queue_timeout", float, "seconds that a request may wait for admission"),
    (
        "promise",
        str,
        "KV memory promised at admission: worst_case (all a request can need) or growth",
    ),
    ("growth_tokens", int, "tokens promised at a time with --promise growth"),
    ("failure_grace", float, "seconds of 503 answers after a process died, before the exit"),
    ("drain_timeout", float, "seconds that requests in flight may take to end after SIGTERM"),
)
_MODEL_FLAGS = tuple(
    SGLangFlag(name=name, kind="str", scope="model", effect="crosspool", help=text)
    for name, text in (
        ("kv_floor_bytes", "KV memory that other models' requests never take (512MiB)."),
        ("kv_ceiling_bytes", "Most KV memory that the model's requests may take."),
    )
)
"""Flags per model that SGLang does not have."""
_BY_NAME = BY_NAME | {flag.name: flag for flag in _MODEL_FLAGS}
_OUR_NAMES = {"model_path": "path", "served_model_name": "name"}
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "json": str, "list": str}


class Parser(argparse.ArgumentParser):
    """Reports a mistake as ConfigError, like every other one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s --model-path DIR [--model-path DIR ...] [flags]",
        description="Serves several Mixture-of-Experts models from one KV pool and one weight "
        "pool, behind SGLang's HTTP server and OpenAI API.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    models = parser.add_argument_group("models (per model)")
    server = parser.add_argument_group("server")
    ignored = parser.add_argument_group("taken from SGLang command lines, without effect")
    pools = parser.add_argument_group("pools")
    for flag in (*FLAGS, *_MODEL_FLAGS):
        group = models if flag.scope == "model" else server
        _add_sglang_flag(ignored if flag.effect == "none" else group, flag)
    for name, kind, text in _POOL_FLAGS:
        pools.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar="X", help=text, default=None
        )
    return parser


def _add_sglang_flag(group: argparse._ArgumentGroup, flag: SGLangFlag) -> None:
    names = [flag.flag, "--model"] if flag.name == "model_path" else [flag.flag]
    options: dict[str, Any] = {"dest": flag.name, "help": flag.help, "default": None}
    if flag.kind == "bool":
        group.add_argument(*names, action="store_true", **options)
        return
    options["type"] = _TYPES[flag.kind]
    if flag.choices:
        options["choices"] = flag.choices
    else:
        options["metavar"] = "X"
    if flag.kind == "list":
        options["nargs"] = "+"
    if flag.scope == "model":
        options["action"] = "append"
    group.add_argument(*names, **options)


def parse(argv: Sequence[str], prog: str = "crosspool serve") -> Draft:
    """Parses a server command line; ``--help`` prints and exits.

    Warns on stderr of flags without effect. Raises ConfigError that names the flag."""
    arguments, unknown = make_parser(prog).parse_known_args(argv)
    for word in unknown:
        name = word.partition("=")[0]
        raise ConfigError(
            f"{word}: {reason_refused(name)}" if name.startswith("-") else f"{word!r}: no flag"
        )
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if "model_path" not in given:
        raise ConfigError("--model-path is missing: name at least one model's folder")
    shared_sglang: dict[str, Any] = {}
    models: list[dict[str, Any]] = [{"sglang": {}} for _ in given["model_path"]]
    data: dict[str, Any] = {"models": models, "sglang": shared_sglang}
    for name, value in given.items():
        flag = _BY_NAME.get(name)
        if name == "disable_radix_cache":
            data["prefix_cache"] = False
        elif flag is None or (flag.scope == "shared" and flag.effect == "crosspool"):
            data[name] = value
        elif flag.effect == "none":
            print(f"crosspool: {flag.flag} has no effect: {flag.help}", file=sys.stderr)
        elif flag.scope == "shared":
            shared_sglang[name] = _parsed(flag, value)
        else:
            for model, one in zip(models, _per_model(flag, value, len(models)), strict=True):
                if flag.effect == "crosspool":
                    model[_OUR_NAMES.get(name, name)] = one
                else:
                    model["sglang"][name] = _parsed(flag, one)
    return to_draft(data, "command line")


def _per_model(flag: SGLangFlag, value: Any, models: int) -> list[Any]:
    """One value per model: given once for all, or once for each.

    Names and paths are each model's own."""
    if flag.kind == "bool":
        return [value] * models
    if len(value) == models:
        return list(value)
    if len(value) == 1 and flag.name != "served_model_name":
        return list(value) * models
    raise ConfigError(
        f"{flag.flag} is given {len(value)} times for {models} models: give it "
        + ("" if flag.name == "served_model_name" else "once for all, or ")
        + "once per model in the order of --model-path"
    )


def _parsed(flag: SGLangFlag, value: Any) -> Any:
    if flag.kind != "json":
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag.flag}: {value!r} is no JSON: {error}") from None
