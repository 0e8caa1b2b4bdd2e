"""The native kernels on one core, against floors: the time to read the memory that a kernel must
read, or the time of its multiplications at the core's best rate, whichever is longer.

    python -m benchmark.kernels [--isa avx512] [--dtype bfloat16] [--seconds 0.3] [--core 1]

Two tables are printed and recorded. The first shows the machine: how fast one core and all cores
read memory, and how long a team's barrier takes. The second shows the kernels; the floor of each is
measured in the same run, in turns with it. The shapes are those of a Qwen3-MoE (hidden 1024, 64
experts of width 512, top-4, 16 q and 4 kv heads of 64), of a dense layer of width 3072, and of MLA
with 16 heads over latents of 512. Attention is measured with a KV cache of the model's dtype, and
of floats of 8 bits (``_e4m3``, ``_e5m2``), whose floors are those of half the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from crosspool.kernels.isa import ISAS, available_isas, default_isa
from rich.console import Console
from rich.table import Column, Table

from benchmark import floors
from benchmark.programs import Stopwatch, build
from benchmark.records import Recorder

_READ_BYTES = 1 << 28
_MEETINGS = 2000
"""Rounds of the barrier, a hundred meetings each."""
COLUMNS = ("kernel", "rows", "median us", "p99 us", "floor us", "of the floor", "GB/s", "GFLOP/s")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.kernels", description=__doc__)
    parser.add_argument("--isa", choices=ISAS, default=default_isa())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.3,
        help="Measuring time for each kernel and shape, in seconds.",
    )
    parser.add_argument(
        "--core", type=int, default=max(os.sched_getaffinity(0)), help="Core to run on."
    )
    given = parser.parse_args(words)
    if given.isa not in available_isas():
        parser.error(f"this machine does not have {given.isa}")
    program = build("kernel_benchmark")
    recorder = Recorder("kernels")
    _machine(recorder, given.core)
    watch = Stopwatch()
    pinned = ["taskset", "-c", str(given.core)]
    done = subprocess.run(
        [*pinned, str(program), str(given.seconds), given.isa, given.dtype],
        check=True,
        capture_output=True,
        text=True,
    )
    used = watch.read()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    table = Table(
        *(Column(name, no_wrap=True) for name in COLUMNS),
        title=f"{given.isa}, {given.dtype}, one core, load {watch.load1:.2f}",
    )
    for row in rows:
        summary = recorder.add(
            row["name"],
            row["us"],
            "us",
            parameters={"isa": row["isa"], "dtype": row["dtype"], "rows": row["rows"]},
            ratio_to="floor",
            ratio=row["share_of_floor"],
            floor=row["floor_us"],
            bytes=row["bytes"],
            flops=row["flops"],
            peak_flops=row["peak_flops"],
            **used,
        )
        assert summary.median is not None and summary.p99 is not None
        table.add_row(*_cells(row, summary.median, summary.p99))
    recorder.write()
    Console().print(table)
    return 0


def _machine(recorder: Recorder, core: int) -> None:
    """Records and prints how fast the machine reads memory and how long a barrier takes."""
    cores = sorted(os.sched_getaffinity(0))
    table = Table("machine", "cores", "median", "p99", "unit")
    for name, some in (("read", [core]), ("read", cores), ("barrier", cores)):
        watch = Stopwatch()
        if name == "read":
            seconds = floors.read_seconds(some, _READ_BYTES)
            values, unit = [_READ_BYTES / value / 1e9 for value in seconds], "GB/s"
        else:
            command = [str(build("barrier")), str(_MEETINGS), *map(str, some)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            values, unit = json.loads(done.stdout)["us"], "us"
        summary = recorder.add(
            name,
            values,
            unit,
            parameters={"cores": len(some)},
            **watch.read(),
        )
        table.add_row(name, str(len(some)), f"{summary.median:.3g}", f"{summary.p99:.3g}", unit)
    Console().print(table)


def _cells(row: dict[str, Any], median: float, p99: float) -> list[str]:
    bound = row["floor_us"] > 0
    return [
        row["name"],
        str(row["rows"]),
        f"{median:.1f}",
        f"{p99:.1f}",
        f"{row['floor_us']:.1f}" if bound else "",
        f"{100 * row['share_of_floor']:.0f} %" if bound else "",
        f"{row['bytes'] / median / 1e3:.1f}" if bound else "",
        f"{row['flops'] / median / 1e3:.1f}" if bound else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
