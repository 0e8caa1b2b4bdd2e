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
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from crosspool.config.process import die_with_parent, freeze_heap
from crosspool.frontend import compat
from crosspool.server.listeners import Listeners
from crosspool.server.process import PROCESSES, Place, leave, prepare, run
from crosspool.transport.forks import MAX_MESSAGE_BYTES, Fork, Forked

log = logging.getLogger(__name__)

_GO = b"go"


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
    compat.install()
    from crosspool.frontend import detokenizer, model_app, private_routes  # noqa: F401
    from crosspool.server import http_process, scheduler_loop  # noqa: F401

    private_routes.mended_http_server()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        log.warning("importing SGLang started %d threads, which forked processes lack", threads - 1)
    freeze_heap()  # the collector, writing to every object, would soon have copied all pages too


def serve_forks(processes: Mapping[str, Callable[[int], int]], launcher_fd: int) -> None:
    """Forks one of ``processes`` for each Fork that the launcher sends, and replies with a Forked.
    A function takes the number of its incarnation; what it returns is its process's exit status.
    Returns when the launcher has closed its end."""
    launcher = os.getppid()
    with socket.socket(fileno=launcher_fd) as to_launcher:
        while request := to_launcher.recv(MAX_MESSAGE_BYTES):
            fork = msgspec.json.decode(request, type=Fork)
            run = partial(processes[fork.name], fork.incarnation)
            pid, go = _fork_orphan(run, to_launcher, launcher)
            to_launcher.send(msgspec.json.encode(Forked(name=fork.name, pid=pid)))
            os.write(go, _GO)
            os.close(go)


def _fork_orphan(
    run: Callable[[], int], to_launcher: socket.socket, launcher: int
) -> tuple[int, int]:
    """Forks a process that is a child of the launcher's: its own parent has ended, and the launcher
    adopts orphans. Returns its pid and a pipe; it runs when it has read :data:`_GO` from that."""
    wait, go = os.pipe()
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid == 0:
            to_launcher.close()
            for fd in (go, read, write):
                os.close(fd)
            _wait_for_adoption(wait, launcher)
            leave(run())
        os.setpgid(pid, pid)
        os.write(write, pid.to_bytes(8, "little"))
        os._exit(0)
    os.close(wait)
    os.close(write)
    os.waitpid(between, 0)
    with os.fdopen(read, "rb") as file:
        return int.from_bytes(file.read(8), "little"), go


def _wait_for_adoption(wait: int, launcher: int) -> None:
    """Returns when the launcher is the parent and this process would end with it."""
    with os.fdopen(wait, "rb") as file:
        if file.read(len(_GO)) != _GO:  # the fork server has ended
            os._exit(1)
    die_with_parent()
    if os.getppid() != launcher:  # it has ended
        os._exit(1)


if __name__ == "__main__":
    leave(main())
