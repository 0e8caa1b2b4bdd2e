"""Prints the deployment file with every key, its help and its default:

python -m crosspool.config.example > deployment.example.yaml
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator

from crosspool.config.option import Option
from crosspool.config.options import MODEL_OPTIONS, SERVER_OPTIONS

_HEAD = """\
# crosspool serve --config deployment.example.yaml
#
# Every key but models has a default. Relative paths are relative to this file.

models:
  - path: python/crosspool/demo/tiny-qwen3-moe
    name: qwen

  # A model with every key that a model may have.
  -"""
_SGLANG = "Arguments of SGLang's front end{}. `crosspool serve --help` lists them."
_WIDTH = 100


def example() -> str:
    lines = [_HEAD]
    for option in MODEL_OPTIONS.values():
        lines += _key(option, " " * 4)
    lines += _comment(_SGLANG.format(" for this model alone"), " " * 4)
    lines += ["    sglang:", "      sampling_defaults: openai"]
    for group, options in itertools.groupby(SERVER_OPTIONS.values(), lambda one: one.group):
        lines += ["", f"# ---- {group} ----"]
        for option in options:
            lines += ["", *_key(option, "")]
    lines += ["", *_comment(_SGLANG.format(" for every model"), "")]
    lines += ["sglang:", "  log_level: info"]
    return "\n".join(lines) + "\n"


def _key(option: Option, indent: str) -> Iterator[str]:
    yield from _comment(option.help, indent)
    if option.example is None and option.default is None:
        yield f"{indent}# {option.name}: {option.metavar}"
        return
    notes: list[str] = [option.unit] if option.unit not in ("", "bytes", "devices") else []
    value = option.example
    if value is None:
        value = option.written(option.default)
    elif option.default is not None:
        notes.append(f"default: {option.written(option.default)}")
    note = f"  # {', '.join(notes)}" if notes else ""
    yield f"{indent}{option.name}: {value}{note}"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )


if __name__ == "__main__":
    print(example(), end="")
