"""CPU time of a measurement, and of everything else that ran during it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmark import machine
from benchmark.server import Server


@dataclass
class Usage:
    """CPU time within the ``with``: of one server's processes, of this one, and of all others.

    >>> with Usage(server) as usage:
    ...     replay(server.url, load)
    >>> usage.server_cpu_s
    """

    server: Server
    load1: float = 0.0
    """Load average at the start."""
    wall_s: float = 0.0
    server_cpu_s: float = 0.0
    own_cpu_s: float = 0.0
    other_cpu_s: float = 0.0
    """CPU seconds of everything else on the machine. If they exceed a few percent of the wall time,
    the measured times cannot be trusted."""

    def __enter__(self) -> Usage:
        self.load1 = machine.load1()
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, server, own = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )
        self.wall_s, self.server_cpu_s, self.own_cpu_s = wall, server, own
        self.other_cpu_s = max(0.0, busy - server - own)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the server and of this process."""
        return self.server_cpu_s + self.own_cpu_s

    def _now(self) -> tuple[float, float, float, float]:
        server = sum(self.server.cpu_seconds().values())
        return time.perf_counter(), machine.busy_seconds(), server, time.process_time()


def total(usages: Sequence[Usage]) -> dict[str, Any]:
    """Sum several measurements up as fields of a record. ``other_cpu_share`` is the CPU time of
    others as a share of one core."""
    wall = sum(usage.wall_s for usage in usages)
    return {
        "cpu_s": sum(usage.cpu_s for usage in usages),
        "wall_s": wall,
        "load1": max(usage.load1 for usage in usages),
        "other_cpu_share": sum(usage.other_cpu_s for usage in usages) / wall,
    }
