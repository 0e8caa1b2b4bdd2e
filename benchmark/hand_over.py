"""What a hand-over between two devices costs: from a dispatch's first byte written on one core to
its last byte read on another, over the lane buffers, half of each round trip.

    python -m benchmark.hand_over [--bytes 4096 ...] [--rounds 20000] [--cores 0 1]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmark import machine
from benchmark.records import ROOT, Recorder

BUILD = ROOT / "build" / "benchmark"


def main(words: Sequence[str] | None = None) -> int:
    cores = sorted(os.sched_getaffinity(0))[-2:]
    parser = argparse.ArgumentParser(prog="python -m benchmark.hand_over", description=__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 16384, 131072])
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--cores", type=int, nargs=2, default=cores)
    given = parser.parse_args(words)
    if len(given.cores) < 2:
        parser.error("two cores are needed")
    program = build()
    recorder = Recorder("hand_over")
    table = Table("bytes", "median us", "p99 us", title="hand-over between two cores")
    for size in given.bytes:
        load1, start, before = machine.load1(), time.monotonic(), _child_seconds()
        command = [str(program), str(size), str(given.rounds), *map(str, given.cores)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        summary = recorder.add(
            "hand-over",
            json.loads(done.stdout)["us"],
            "us",
            parameters={"bytes": size, "cores": given.cores},
            cpu_s=_child_seconds() - before,
            wall_s=time.monotonic() - start,
            load1=load1,
        )
        table.add_row(str(size), f"{summary.median:.2f}", f"{summary.p99:.2f}")
    recorder.write()
    Console().print(table)
    return 0


def build() -> Path:
    """Builds the benchmark's program; returns its path."""
    configure = ["cmake", "-S", str(ROOT / "sgl-kernel-ext"), "-B", str(BUILD)]
    options = ["-DCROSSPOOL_BUILD_BENCHMARKS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*configure, *options], check=True, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", str(BUILD), "--target", "hand_over", "-j2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return BUILD / "benchmark" / "hand_over"


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
