"""``crosspool ps``: the models of a running server, and where their weights are."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from rich.live import Live

from crosspool.cli.managing import add_port
from crosspool.config.runtime_dir import find_running
from crosspool.observability.models_table import models_table
from crosspool.observability.pools_table import make_console
from crosspool.transport import admin

_EPILOG = """\
examples:
  crosspool ps
  crosspool ps --watch           # until Ctrl-C, every second
  crosspool ps --json | jq '.[] | select(.state == "asleep") | .name'
"""


def run(words: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Shows the models of a server that you run on this machine: which are awake, "
        "what memory they take, and who uses them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=1.0,
        metavar="SECONDS",
        help="show it again and again, every second unless SECONDS are given",
    )
    how.add_argument("--json", action="store_true", help="print it as JSON")
    add_port(parser)
    arguments = parser.parse_args(words)

    deployment = find_running(arguments.port)
    status = admin.status(deployment.admin_address)
    if arguments.json:
        print(json.dumps([model.summary() for model in status.models], indent=2))
        return 0
    console = make_console()
    if arguments.watch is None:
        console.print(models_table(deployment, status.models))
        return 0
    try:
        with Live(models_table(deployment, status.models), console=console) as live:
            while True:
                time.sleep(arguments.watch)
                status = admin.status(deployment.admin_address)
                live.update(models_table(deployment, status.models), refresh=True)
    except KeyboardInterrupt:
        return 0


def _seconds(word: str) -> float:
    seconds = float(word)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{word} is not between 0.1 and 3600 seconds")
    return seconds
