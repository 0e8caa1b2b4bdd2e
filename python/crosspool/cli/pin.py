"""``crosspool pin``: says when a model of a running server has its weights in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from crosspool.cli import managing
from crosspool.config.options import Keep

_DESCRIPTION = """\
Says when a model has its weights in memory, until the server ends: pinned is always, demand is
while requests come or nobody else needs the room, asleep is only while requests come."""


def run(words: Sequence[str], prog: str) -> int:
    parser = managing.parser(prog, _DESCRIPTION, "crosspool pin qwen --keep demand")
    parser.add_argument(
        "--keep", choices=get_args(Keep), default="pinned", help="what holds (default: pinned)"
    )
    arguments = parser.parse_args(words)
    told = managing.post(arguments.port, arguments.name, "pin", {"keep": arguments.keep})
    print(f"{arguments.name}: keep is {told['keep']}; it is {told['state'].replace('_', ' ')}")
    return 0
