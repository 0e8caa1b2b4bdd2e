"""How long the system has held the threads of a process up, although they wanted to go on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_SYSTEM_TIME = 12
"""Place of the ticks in the kernel in /proc/PID/task/TID/stat, counted from the state on."""


def held_up(pid: int) -> dict[str, float]:
    """Returns for each thread of the process, by its id, the seconds for which it has waited for a
    processor or was busy in the kernel, which finds it memory. Empty where there is no such
    process."""
    found = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # the thread has ended
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                waited = int((task / "schedstat").read_text().split()[1])
                found[task.name] = int(fields[_SYSTEM_TIME]) / _TICKS + waited / 1e9
    return found
