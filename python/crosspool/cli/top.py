"""``crosspool top``: watches a running server, and has models wake and sleep."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from crosspool.cli.keyboard import Keyboard
from crosspool.cli.managing import add_port
from crosspool.cli.watched import WatchedServer
from crosspool.config.deployment import ConfigError
from crosspool.observability.pools_table import make_console
from crosspool.observability.top_state import SORTS, Look, ModelLine, TopState, top_state
from crosspool.observability.top_view import frame
from crosspool.transport.admin import AdminError

KEY_VARIABLE = "CROSSPOOL_ADMIN_API_KEY"
_EPILOG = f"""\
keys:
  ↑ ↓ PgUp PgDn Home End   choose a model
  s                        sort by the next of
                           {", ".join(SORTS)}
  w, z                     wake the chosen model, have it sleep
  p                        pin it, or let it go if it is pinned
  q                        quit

examples:
  crosspool top
  crosspool top --once --sort memory       # one frame with all models, for scripts
  {KEY_VARIABLE}=KEY crosspool top --url http://10.0.0.1:30000
"""
_WINDOW_SECONDS = 10.0
"""Time that quantiles are of, once it has been watched for so long."""
_NOTICE_SECONDS = 5.0
_ORDERS = {"w": "wake", "z": "sleep", "p": "pin"}
_MOVES = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -10, "page down": 10}


def run(words: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Watches a server: its pools, its models and where their weights are,\n"
        "requests, tokens per second, and times to the first token and between tokens.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--once", action="store_true", help="print one frame with all models")
    parser.add_argument("--sort", choices=SORTS, default="requests", help="(default: requests)")
    parser.add_argument(
        "--every",
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="time between two looks (default: 1)",
    )
    add_port(parser)
    parser.add_argument("--url", help="address of a server elsewhere, as in http://HOST:PORT")
    parser.add_argument(
        "--admin-api-key",
        metavar="KEY",
        default=os.environ.get(KEY_VARIABLE),
        help=f"its admin key; other users cannot read it where ${KEY_VARIABLE} has it",
    )
    arguments = parser.parse_args(words)
    console = make_console()
    if not arguments.once and not (sys.stdin.isatty() and console.is_terminal):
        raise ConfigError("there is no terminal here: give --once for one frame")
    try:
        server = WatchedServer(arguments.port, arguments.url, arguments.admin_api_key)
        look = server.look()
    except AdminError as error:
        raise ConfigError(str(error)) from None
    if arguments.once:
        for line in frame(top_state(server.where, look, sort=arguments.sort), console.width):
            console.print(line, soft_wrap=True)
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _Watch(server, look, arguments.sort, arguments.every).run(console)
    return 0


class _Watch:
    """Looks at ``server`` every so many seconds, draws, and does what keys say."""

    def __init__(self, server: WatchedServer, look: Look, sort: str, every: float) -> None:
        self._server = server
        self._looks = deque([look])
        self._sort = sort
        self._every = every
        self._selected: str | None = None
        self._notice = ""
        self._notice_ends = 0.0
        self._said: deque[str] = deque()
        """What the server has said to orders, which other threads give."""

    def run(self, console: Console) -> None:
        """Returns when the user quits."""
        with Keyboard() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
            due = time.monotonic() + self._every
            while True:
                lines = frame(self._state(), console.width, console.height)
                live.update(Group(*lines), refresh=True)
                key = keyboard.read(max(0.0, due - time.monotonic()))
                if key in ("q", "escape"):
                    return
                if key is not None:
                    self._press(key)
                if time.monotonic() >= due:
                    self._look()
                    due = time.monotonic() + self._every

    def _look(self) -> None:
        if self._said:
            self._tell(self._said.popleft())
        try:
            self._looks.append(self._server.look())
        except (AdminError, ConfigError) as error:
            self._tell(str(error))
            return
        while len(self._looks) > 2 and self._looks[-1].at - self._looks[1].at >= _WINDOW_SECONDS:
            self._looks.popleft()

    def _state(self) -> TopState:
        now, earlier = self._looks[-1], self._looks[0]
        return top_state(
            self._server.where,
            now,
            earlier if earlier is not now else None,
            sort=self._sort,
            selected=self._selected,
            notice=self._notice if time.monotonic() < self._notice_ends else "",
        )

    def _tell(self, text: str) -> None:
        self._notice = text
        self._notice_ends = time.monotonic() + _NOTICE_SECONDS

    def _press(self, key: str) -> None:
        models = self._state().models
        names = [model.name for model in models]
        if key == "s":
            sorts = list(SORTS)
            self._sort = sorts[(sorts.index(self._sort) + 1) % len(sorts)]
        elif not names:
            return
        elif key in ("home", "g"):
            self._selected = names[0]
        elif key in ("end", "G"):
            self._selected = names[-1]
        elif key in _MOVES:
            place = names.index(self._selected) if self._selected in names else -1
            place = max(place, 0) if place < 0 and _MOVES[key] < 0 else place + _MOVES[key]
            self._selected = names[min(max(place, 0), len(names) - 1)]
        elif key in _ORDERS:
            chosen = next((model for model in models if model.name == self._selected), None)
            self._order(_ORDERS[key], chosen)

    def _order(self, what: str, model: ModelLine | None) -> None:
        if model is None:
            self._tell("choose a model first, with ↑ and ↓")
            return
        body = None
        if what == "pin":
            body = {"keep": "demand" if model.keep == "pinned" else "pinned"}
        arguments = model.name, what, body
        # A daemon: who quits does not wait for it.
        threading.Thread(target=self._carry_out, args=arguments, daemon=True).start()
        self._tell(f"{what} {model.name} ...")

    def _carry_out(self, name: str, what: str, body: dict[str, Any] | None) -> None:
        try:
            self._said.append(self._server.order(name, what, body))
        except (AdminError, ConfigError) as error:
            self._said.append(str(error))


def _seconds(word: str) -> float:
    seconds = float(word)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{word} is not between 0.1 and 3600 seconds")
    return seconds
