"""Forks processes for the launcher, which become its own children: what every fork server does once
it has imported what they need. :class:`crosspool.cli.forked.ForkServer` is the launcher's end."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Mapping
from functools import partial

import msgspec

from crosspool.config.process import die_with_parent, leave
from crosspool.transport.forks import MAX_MESSAGE_BYTES, Fork, Forked

_GO = b"go"


def serve_forks(
    processes: Mapping[str, Callable[[int], int]],
    launcher_fd: int,
    beside: Mapping[int, Callable[[], None]] | None = None,
) -> None:
    """Forks one of ``processes`` for each Fork that the launcher sends, and replies with a Forked.
    A function takes the number of its incarnation; what it returns is its process's exit status.
    ``beside``: functions that are called whenever a descriptor is readable, and before every fork.
    Returns when the launcher has closed its end."""
    launcher, others = os.getppid(), beside or {}
    with socket.socket(fileno=launcher_fd) as to_launcher:
        while True:
            ready = select.select([to_launcher.fileno(), *others], [], [])[0]
            for serve in others.values():
                serve()
            if to_launcher.fileno() not in ready:
                continue
            if not (request := to_launcher.recv(MAX_MESSAGE_BYTES)):
                return
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
