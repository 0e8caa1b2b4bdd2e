"""Processes that a fork server starts for the launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import replace

import msgspec

from crosspool.cli.child import Child, ProcessSpec
from crosspool.transport.forks import MAX_MESSAGE_BYTES, Fork, Forked


class _Adopted:
    """A process that another one forked, and of which this process has become the parent."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class ForkServer:
    """A process that imports once what several others need, and forks one of them whenever it is
    asked. They become children of this process, which must be a subreaper for that
    (:func:`crosspool.config.process.adopt_orphans`).

    The process of ``spec`` gets one more argument, ``--launcher-fd N``, which is a socket; see
    :mod:`crosspool.transport.forking`. It is started when it is first needed, and again when it
    has ended and is needed."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self._child: Child | None = None
        self._socket: socket.socket | None = None
        self._waiting: dict[str, ProcessSpec] = {}
        """Processes that it was asked for and has not forked yet, by name."""

    @property
    def is_needed(self) -> bool:
        """Whether it has been asked for a process that is not there yet."""
        return bool(self._waiting)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return self._child is not None and self._child.is_stopped()

    def kill(self) -> None:
        """Kills it; :meth:`poll` will tell."""
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    @property
    def teller(self) -> socket.socket | None:
        """Readable when :meth:`poll` has something to return; None while nothing runs."""
        return self._socket

    def fork(self, spec: ProcessSpec) -> None:
        """Asks for the process of ``spec``; :meth:`poll` returns it once it is there. Raises
        OSError when the fork server cannot be started."""
        self._waiting[spec.name] = spec
        if self._child is None:
            self.start()
        else:
            self._ask(spec)

    def start(self) -> None:
        """Starts it unless it runs, and asks for the processes that are not there yet; call it when
        it has ended while it was needed. Raises OSError."""
        if self._child is not None:  # a process was asked of it meanwhile
            return
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            argv = [*self.spec.argv, "--launcher-fd", str(fd)]
            pass_fds = [*self.spec.pass_fds, fd]
            self._child = replace(self.spec, argv=argv, pass_fds=pass_fds).spawn()
        for spec in self._waiting.values():
            self._ask(spec)

    def _ask(self, spec: ProcessSpec) -> None:
        assert self._socket is not None
        fork = Fork(name=spec.name, incarnation=spec.incarnation)
        with contextlib.suppress(BrokenPipeError):  # it has just ended, which poll() tells
            self._socket.send(msgspec.json.encode(fork))

    def poll(self) -> tuple[list[Child], int | None]:
        """The processes that are there now and were not at the last call, and the exit status of
        the fork server if it has ended since then."""
        child = self._child
        if child is None:
            return [], None
        if child.has_ended():
            return self.end(), child.reap()
        return self._handed_over(), None

    def collect(self) -> list[Child]:
        """The processes that are there now and were not at the last call, as :meth:`poll`."""
        return [] if self._socket is None else self._handed_over()

    def end(self) -> list[Child]:
        """Ends the fork server. Returns the processes that are there and were not at the last
        :meth:`poll`; those that it has not handed over end with it."""
        if self._child is None or self._socket is None:
            return []
        self._child.reap()
        children = self._handed_over()
        self._socket.close()
        self._child = self._socket = None
        return children

    def _handed_over(self) -> list[Child]:
        assert self._socket is not None
        children: list[Child] = []
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while message := self._socket.recv(MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT):
                forked = msgspec.json.decode(message, type=Forked)
                children.append(Child(self._waiting.pop(forked.name), _Adopted(forked.pid)))
        return children
