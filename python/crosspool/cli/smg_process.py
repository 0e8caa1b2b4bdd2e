"""The process that is smg, SGLang's model gateway, below ``crosspool router``.

What it is to do comes by standard input, so that no command line and no environment has a key."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec


class SmgTask(msgspec.Struct, kw_only=True):
    """What smg is started with."""

    arguments: Sequence[str]
    """Its own flags."""
    api_key: str | None
    """Key that its clients must send."""
    admin_api_key: str | None
    """Key that its management routes ask for; without one they ask for ``api_key``."""


def main() -> None:
    """Serves until a signal comes. Ends with status 2 for flags that smg does not take."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=SmgTask)
    from smg.launch_router import launch_router, parse_router_args

    arguments = parse_router_args(list(task.arguments))
    arguments.api_key = task.api_key
    if task.admin_api_key is not None:
        admin = ("admin", "admin", task.admin_api_key, "admin")
        arguments.control_plane_api_keys = [admin]
    launch_router(arguments)


if __name__ == "__main__":
    main()
