"""Imports SGLang once, and forks the front end's three processes.

    python -m crosspool.server.fork_server --deployment FILE --launcher-fd N

Importing SGLang takes longer than anything else at the start, and its modules half a gigabyte.
Forked processes share the import and the memory that they do not change. The fork server ends as
soon as it has sent the launcher their pids; :class:`crosspool.cli.child.ForkServer` describes what
happens then. Each of the three can also be started alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from crosspool.config.process import die_with_parent, freeze_heap
from crosspool.frontend import compat
from crosspool.server.process import PROCESSES, leave, prepare, run

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="crosspool front end")
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    parser.add_argument("--launcher-fd", type=int, required=True, help="socket to the launcher")
    arguments = parser.parse_args(argv)

    die_with_parent()
    prepare("front end", arguments.deployment)
    _import_everything()
    processes = {name: partial(run, name, arguments.deployment) for name in PROCESSES}
    fork_all(processes, arguments.launcher_fd)
    return 0


def _import_everything() -> None:
    compat.install()
    from crosspool.frontend import detokenizer, model_app  # noqa: F401
    from crosspool.server import http_process, scheduler_loop  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        log.warning("importing SGLang started %d threads, which forked processes lack", threads - 1)
    freeze_heap()  # the collector, writing to every object, would soon have copied all pages too


def fork_all(processes: Mapping[str, Callable[[], int]], launcher_fd: int) -> None:
    """Forks ``processes``, each in a process group of its own, and sends their pids to the
    launcher. What a function returns is its process's exit status."""
    launcher = os.getppid()
    with socket.socket(fileno=launcher_fd) as to_launcher:
        pids = {}
        for name, run in processes.items():
            pid = os.fork()
            if pid == 0:
                _wait_for_adoption(to_launcher, launcher)
                leave(run())
            os.setpgid(pid, pid)
            pids[name] = pid
        to_launcher.send(json.dumps(pids).encode())


def _wait_for_adoption(to_launcher: socket.socket, launcher: int) -> None:
    """Returns when the launcher is the parent and this process would end with it."""
    with to_launcher:
        if to_launcher.recv(len(b"go")) != b"go":
            os._exit(1)
    die_with_parent()
    if os.getppid() != launcher:  # it ended in between
        os._exit(1)


if __name__ == "__main__":
    leave(main())
