"""How long a hand-over between two devices takes over the lane buffers: from the first byte of a
dispatch written on one core to its last byte read on another. It is half of a round trip.

    python -m benchmark.hand_over [--bytes 4096 ...] [--rounds 20000] [--cores 0 1]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmark.programs import Stopwatch, build
from benchmark.records import Recorder


def main(words: Sequence[str] | None = None) -> int:
    cores = sorted(os.sched_getaffinity(0))[-2:]
    parser = argparse.ArgumentParser(prog="python -m benchmark.hand_over", description=__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 16384, 131072])
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--cores", type=int, nargs=2, default=cores)
    given = parser.parse_args(words)
    if len(given.cores) < 2:
        parser.error("two cores are needed")
    program = build("hand_over")
    recorder = Recorder("hand_over")
    table = Table("bytes", "median us", "p99 us", title="hand-over between two cores")
    for size in given.bytes:
        watch = Stopwatch()
        command = [str(program), str(size), str(given.rounds), *map(str, given.cores)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        summary = recorder.add(
            "hand-over",
            json.loads(done.stdout)["us"],
            "us",
            parameters={"bytes": size, "cores": given.cores},
            **watch.read(),
        )
        table.add_row(str(size), f"{summary.median:.2f}", f"{summary.p99:.2f}")
    recorder.write()
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
