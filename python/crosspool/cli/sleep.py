"""``crosspool sleep``: has a model of a running server give up the memory of its weights."""

from __future__ import annotations

from collections.abc import Sequence

from crosspool.cli import managing
from crosspool.config.sizes import format_size

_DESCRIPTION = """\
Has a model give up the memory of its weights. Its KV cache stays, and requests that it has go on
when it is woken: by `crosspool wake`, or by a request."""


def run(words: Sequence[str], prog: str) -> int:
    arguments = managing.parser(prog, _DESCRIPTION, "crosspool sleep qwen").parse_args(words)
    told = managing.post(arguments.port, arguments.name, "sleep")
    weights = format_size(told["attention_bytes"] + told["ffn_bytes"])
    print(f"{arguments.name} is {told['state'].replace('_', ' ')}; its weights take {weights}")
    return 0
