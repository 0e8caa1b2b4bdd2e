"""``crosspool unload``: has a running server serve a model no more."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from crosspool.cli import managing

_DESCRIPTION = """\
Has a server serve a model no more, and waits until nothing is left of it. New requests get 404 at
once; those that the model has may end first."""


def run(words: Sequence[str], prog: str) -> int:
    parser = managing.parser(prog, _DESCRIPTION, "crosspool unload qwen")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="time that its requests get to end, before they are ended with 503 (default: the "
        "server's drain_timeout)",
    )
    arguments = parser.parse_args(words)
    query = "" if arguments.timeout is None else f"?timeout={arguments.timeout:g}"
    managing.call(arguments.port, "DELETE", f"/{quote(arguments.name)}{query}")
    print(f"{arguments.name} is unloaded")
    return 0
