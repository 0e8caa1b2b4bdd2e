"""``crosspool load``: has a running server serve a further model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosspool.cli import managing
from crosspool.config.flags import Parser, add_flag
from crosspool.config.option import Option
from crosspool.config.options import MODEL_OPTIONS
from crosspool.config.sglang_flags import FLAGS
from crosspool.config.sizes import format_size

_DESCRIPTION = """\
Has a server serve a further model, and waits until requests for it are taken. Its weights are read
when the first request comes, or at once with --keep pinned."""
_EPILOG = """\
examples:
  crosspool load models/qwen
  crosspool load models/qwen --name qwen --keep pinned --context-length 8192
"""
_GIVEN_OTHERWISE = ("path", "name")


def run(words: Sequence[str], prog: str) -> int:
    parser = Parser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="folder of the model's checkpoint")
    parser.add_argument("--name", help="the model's name in requests (default: the folder's name)")
    managing.add_port(parser)
    group = parser.add_argument_group("the model")
    for option in _options():
        add_flag(group, option)
    given = vars(parser.parse_args(words))
    body: dict[str, Any] = {"path": str(Path(given["path"]).absolute()), "sglang": {}}
    if given["name"] is not None:
        body["name"] = given["name"]
    for option in _options():
        if option.name in given:
            home = body["sglang"] if option.effect == "sglang" else body
            home[option.name] = _plain(option, given[option.name])
    told = managing.call(given["port"], "POST", "", body)
    weights = format_size(told["attention_bytes"] + told["ffn_bytes"])
    print(f"{told['name']} is {told['state'].replace('_', ' ')}; its weights take {weights}")
    return 0


def _options() -> list[Option]:
    """The options that one model can have."""
    own = [option for name, option in MODEL_OPTIONS.items() if name not in _GIVEN_OTHERWISE]
    return [*own, *(flag for flag in FLAGS if flag.per_model and flag.effect == "sglang")]


def _plain(option: Option, value: Any) -> Any:
    """The value of a flag as JSON has it. A flag that is given several times counts the last
    time."""
    last = value[-1] if isinstance(value, list) and option.plain_type is not bool else value
    return option.written(last) if option.unit in ("bytes", "devices") else last
