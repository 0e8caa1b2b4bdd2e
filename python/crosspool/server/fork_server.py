"""Imports SGLang once, and forks one of the front end's three processes whenever it is asked.

    python -m crosspool.server.fork_server --deployment FILE --launcher-fd N --listeners N N

Importing SGLang takes longer than anything else at the start, and its modules half a gigabyte.
Forked processes share the import and the memory that they do not change, and one that takes the
place of a dead one is there at once. :class:`crosspool.cli.forked.ForkServer` is the launcher's end
of the socket. Each of the three can also be started alone.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from crosspool.config.process import die_with_parent, freeze_heap, leave, without_collections
from crosspool.frontend import compat
from crosspool.server.listeners import Listeners
from crosspool.server.process import PROCESSES, Place, prepare, run
from crosspool.transport.forking import serve_forks

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="crosspool front end")
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    parser.add_argument("--launcher-fd", type=int, required=True, help="socket to the launcher")
    parser.add_argument(
        "--listeners", type=int, nargs=2, required=True, help="sockets of the HTTP process"
    )
    arguments = parser.parse_args(argv)

    die_with_parent()
    prepare("front end", arguments.deployment)
    _import_everything()
    listeners = Listeners.inherited(arguments.listeners)

    def run_as(name: str, incarnation: int) -> int:
        place = Place(incarnation=incarnation, listeners=listeners)
        return run(name, arguments.deployment, place)

    serve_forks({name: partial(run_as, name) for name in PROCESSES}, arguments.launcher_fd)
    return 0


def _import_everything() -> None:
    with without_collections():
        compat.install()
        from crosspool.frontend import detokenizer, model_app, private_routes  # noqa: F401
        from crosspool.server import http_process, scheduler_loop  # noqa: F401

        private_routes.mended_http_server()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        log.warning("importing SGLang started %d threads, which forked processes lack", threads - 1)
    freeze_heap()  # the collector, writing to every object, would soon have copied all pages too


if __name__ == "__main__":
    leave(main())
