"""Prints recorded figures as one table.

    python -m benchmark.report [NAME ...]

The rows are those of the named benchmarks' files in ``benchmark/results``, which hold times of
engines' steps or of kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmark.records import RESULTS, read_rows

NAMES = ("kernels", "hand_over", "engine", "ablation", "side_by_side")


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="Recorded", title_justify="left", box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    made.add_column("name", no_wrap=True)
    for column in ("batch", "context", "threads", "median", "P99", "ratio"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("to", no_wrap=True)
    for column in ("tokens/s", "load", "CPU s", "wall s"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*map(str, cells(row)))
    return made


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of one row: a kernel (in microseconds) or a step (in milliseconds)."""
    parameters = row.get("parameters", {})
    batch = row.get("batch", parameters.get("rows", ""))
    if "median_ms" in row:
        times = [f"{row[key]:.2f} ms" for key in ("median_ms", "p99_ms")]
    else:
        times = [f"{row[key]:.1f} {row['unit']}" for key in ("median", "p99")]
    ratio, rate = row.get("ratio"), row.get("tokens_per_s")
    return [
        row["benchmark"],
        row["name"],
        str(batch or ""),
        str(row.get("context") or ""),
        str(row.get("threads", 1)),
        *times,
        "" if ratio is None else f"{ratio:.2f}",
        row.get("ratio_to") or "",
        "" if rate is None else f"{rate:.0f}",
        f"{row['load1']:.2f}",
        f"{row['cpu_s']:.1f}",
        f"{row['wall_s']:.1f}",
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.report", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    rows = [
        row
        for name in given.names
        if (path := given.results / f"{name}.jsonl").is_file()
        for row in read_rows(path)
    ]
    Console(width=190).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
