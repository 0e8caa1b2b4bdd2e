"""The native programs that benchmarks run (sgl-kernel-ext/benchmark), and the time they take."""

from __future__ import annotations

import functools
import resource
import subprocess
import time
from pathlib import Path
from typing import TypedDict

from benchmark import machine
from benchmark.records import ROOT

_BUILD = ROOT / "build" / "benchmark"


@functools.cache
def build(target: str) -> Path:
    """Builds a program; returns its path."""
    configure = ["cmake", "-S", str(ROOT / "sgl-kernel-ext"), "-B", str(_BUILD)]
    options = ["-DCROSSPOOL_BUILD_BENCHMARKS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*configure, *options], check=True, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", str(_BUILD), "--target", target, "-j2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return _BUILD / "benchmark" / target


class Used(TypedDict):
    """Fields of a record: CPU time and wall time in seconds, and the load average before."""

    cpu_s: float
    wall_s: float
    load1: float


class Stopwatch:
    """Measures the programs that run from its making on."""

    def __init__(self) -> None:
        self.load1 = machine.load1()
        self._cpu_s, self._start = _child_seconds(), time.monotonic()

    def read(self) -> Used:
        """Returns what the programs used that have ended until now."""
        wall_s = time.monotonic() - self._start
        return {"cpu_s": _child_seconds() - self._cpu_s, "wall_s": wall_s, "load1": self.load1}


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
