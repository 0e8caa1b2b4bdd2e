"""The server's command line: a flag for each option, parsed into Options."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from crosspool.config.errors import ConfigError
from crosspool.config.models_dir import models_in
from crosspool.config.option import Option
from crosspool.config.options import MODEL_OPTIONS, SERVER_OPTIONS, ModelOptions, Options
from crosspool.config.sglang_flags import FLAGS, reason_refused

_USAGE = """\
%(prog)s --model-path DIR [--model-path DIR ...] [flags]
       %(prog)s --models-dir DIR [flags]
       %(prog)s --config FILE [--host HOST] [--port PORT] [--node-rank N]
       %(prog)s --nnodes N --node-rank N --dist-init-addr HOST:PORT --keys FILE"""
EXAMPLES = """\
examples:
  # two models; both pools are on all cores of this machine
  python -m crosspool.launch_server --model-path models/qwen --model-path models/deepseek

  # each pool has its own cores and its size, each model a name
  python -m crosspool.launch_server \\
      --model-path models/qwen     --served-model-name qwen \\
      --model-path models/deepseek --served-model-name deepseek \\
      --kv-pool-devices cpu:0-7 --weight-pool-devices cpu:8-15 \\
      --kv-pool-bytes 8GiB --weight-pool-bytes 60GiB --port 30000

  # the same from a file, which can say more of each model: python -m crosspool.config.example
  # prints one with every key
  crosspool serve --config deployment.yaml

Flags under "per model" are given once for all models, or once for each in the order of
--model-path. A SIZE is a number of bytes such as 512MiB, 2GiB or 1.5GB.
"""


class Parser(argparse.ArgumentParser):
    """Reports a mistake as ConfigError, like every other one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _options() -> list[Option]:
    """Returns every option that has a flag. An option of a model that shares its name with one of
    the server has none: it can be given in a file alone."""
    models = [option for name, option in MODEL_OPTIONS.items() if name not in SERVER_OPTIONS]
    return [*models, *SERVER_OPTIONS.values(), *FLAGS]


def make_parser(prog: str, usage: str = _USAGE) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage=usage,
        description="Serves several Mixture-of-Experts models from one KV pool and one weight "
        "pool, behind SGLang's HTTP server and OpenAI API.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in _options():
        title = option.group or "models, per model"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(groups[title], option)
    return parser


def add_flag(group: argparse._ActionsContainer, option: Option) -> None:
    """Adds the flag of an option; an option that is not given gets no value."""
    names = [option.flag, "--model"] if option.name == "path" else [option.flag]
    settings: dict[str, Any] = {"type": _converter(option), "metavar": option.metavar}
    if option.plain_type is bool:
        settings = {"action": "store_const", "const": not option.default}
    elif option.per_model:
        settings["action"] = "append"
    if option.choices:
        settings.update(choices=option.choices, metavar=None)
    if option.plain_type is list:
        settings["nargs"] = "+"
    text = described(option).replace("%", "%%")
    group.add_argument(*names, dest=option.name, default=argparse.SUPPRESS, help=text, **settings)


def described(option: Option) -> str:
    """The help text of an option's flag, with its default."""
    if option.default is None:
        return option.help
    if option.default is True:
        return f"Turn this off: {option.help[0].lower()}{option.help[1:]}"
    unit = f" {option.unit}" if option.unit not in ("", "bytes", "devices") else ""
    return f"{option.help} (default: {option.written(option.default)}{unit})"


def _converter(option: Option) -> Callable[[str], Any]:
    """Returns the function that makes the value of a flag from its word."""
    kind = option.plain_type

    def convert(word: str) -> Any:
        value = kind(word) if kind in (int, float) else word
        if option.choices or kind is list:
            return value
        try:
            return option.read(json.loads(word) if kind is dict else value)
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"{word!r} is no JSON: {error}") from None
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    convert.__name__ = kind.__name__  # argparse says 'invalid int value'
    return convert


def parse(argv: Sequence[str], prog: str = "crosspool serve", usage: str = _USAGE) -> Options:
    """Parses a server command line; ``--help`` prints and exits.

    Warns on stderr of flags without effect. Raises ConfigError that names the flag."""
    arguments, unknown = make_parser(prog, usage).parse_known_args(argv)
    for word in unknown:
        name = word.partition("=")[0]
        raise ConfigError(
            f"{name}: {reason_refused(name)}" if name.startswith("-") else f"{word!r} is no flag"
        )
    given = vars(arguments)
    named = given.get("path", [])
    found: list[ModelOptions] = []
    if "models_dir" in given:
        found = models_in(given["models_dir"], named)
    elif not named and not given.get("node_rank"):  # other hosts are told by node 0
        raise ConfigError(
            "--model-path is missing: name the folder of at least one model, or give --models-dir "
            "DIR or --config FILE"
        )
    server: dict[str, Any] = {"sglang": {}}
    models: list[dict[str, Any]] = [{"sglang": {}} for _ in named]
    models += [{"sglang": {}, "path": model.path, "name": model.name} for model in found]
    for option in _options():
        if option.name not in given:
            continue
        value = given[option.name]
        if option.effect == "none":
            print(f"crosspool: {option.flag} has no effect: {option.help}", file=sys.stderr)
            continue
        homes = models if option.per_model else [server]
        values = _per_model(option, value, len(named), len(found)) if option.per_model else [value]
        for home, one in zip(homes, values, strict=False):
            (home["sglang"] if option.effect == "sglang" else home)[option.name] = one
    return Options(models=tuple(ModelOptions(**model) for model in models), **server)


def _per_model(option: Option, value: Any, models: int, found: int) -> Sequence[Any]:
    """Returns one value per model, of which ``models`` are named and then ``found`` are found in a
    folder. A flag is given once for all of them or once for each that is named; names and paths are
    each model's own. Raises ConfigError for any other number."""
    own = option.name in ("name", "path")
    if option.plain_type is bool:
        return [value] * (models + found)
    if len(value) == 1 and not own:
        return list(value) * (models + found)
    if len(value) == models:
        return list(value)
    raise ConfigError(
        f"{option.flag} is given {len(value)} times for {models} models: give it "
        + ("" if own else "once for all, or ")
        + "once per model in the order of --model-path"
    )
