"""Processes that the launcher starts, or has a fork server start, and waits for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from crosspool.config.process import die_with_parent


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """Everything that starting a process takes, and starting it again."""

    name: str
    """What messages call it: ``http``, ``device process cpu:0``."""
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the launcher's own environment."""
    pass_fds: Sequence[int] = ()
    device: str | None = None
    """Name of the device that it drives, if it is a device process."""
    restartable: bool = False
    """Whether another process can take its place after it has died."""
    group: str | None = None
    """Name of the processes of its stage that can only be replaced together with it, if there are
    any."""
    forked_by: ProcessSpec | None = None
    """The fork server that forks it, if it is not started as a program of its own."""
    kept: bool = False
    """Whether this fork server, when it is lost, is started again before a process is asked of it.
    """
    takes_later: bool = False
    """Whether the processes of later stages are of no use without it, so that they end with it, and
    are started again with it."""
    is_told_to_end: bool = False
    """Whether it ends, with status 0, when another process than the launcher tells it to, which is
    no loss."""
    incarnation: int = 1
    """How many processes there have been in this place, this one included."""

    def again(self) -> ProcessSpec:
        """Returns the process that takes the place of this one. It gets one more argument,
        ``--incarnation N``."""
        return replace(self, incarnation=self.incarnation + 1)

    @property
    def _command(self) -> list[str]:
        if self.incarnation == 1:
            return [*self.argv]
        return [*self.argv, "--incarnation", str(self.incarnation)]

    def spawn(self) -> Child:
        """Starts it in a process group of its own, so that Ctrl-C reaches the launcher alone. The
        kernel kills it when the launcher ends."""
        process = subprocess.Popen(
            self._command,
            env={**os.environ, **self.env},
            pass_fds=self.pass_fds,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock
        )
        return Child(self, process)


class _Process(Protocol):
    """The part of subprocess.Popen that a Child needs."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def wait(self) -> int: ...


class Child:
    """A process of ours. Its pid, which is also the name of its group, stays ours until
    :meth:`reap`."""

    def __init__(self, spec: ProcessSpec, process: _Process) -> None:
        self.spec = spec
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, as SIGSTOP does, and none has had it continue."""
        if self._process.returncode is not None:
            return False
        # One question: it may end between two, and of a process that has ended Linux does not tell
        # that it was never stopped, but that there is none.
        flags = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        told = os.waitid(os.P_PID, self.pid, flags)
        return told is not None and told.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED)

    def signal(self, number: signal.Signals) -> None:
        if not self.has_ended():
            os.kill(self.pid, number)

    def reap(self) -> int:
        """Kills what is left of its process group and returns the exit status, as subprocess does:
        -n for a process killed by signal n."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            with contextlib.suppress(ChildProcessError):
                while True:  # its children, which are ours now if we adopt orphans
                    os.waitpid(-self.pid, 0)
        return self._process.wait()
