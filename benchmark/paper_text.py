"""What the sections of docs/paper.md are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmark.records import read_rows

Rows = list[dict[str, Any]]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def recorded(name: str, results: Path) -> Rows:
    """Return the rows of a record; none where it was never measured."""
    path = results / f"{name}.jsonl"
    return read_rows(path) if path.is_file() else []


def missing(name: str) -> str:
    """Return what stands in the place of a record that there is not."""
    return f"**Not measured yet**: there is no record `{name}` in benchmark/results."


def machine(rows: Rows) -> str:
    """Return a sentence on the machine of rows and how busy it was."""
    m = rows[0]["machine"]
    loads = [row["load1"] for row in rows]
    others = [row["other_cpu_share"] for row in rows]
    cpu, wall = (
        sum({(r["cpu_s"], r["wall_s"]): r[key] for r in rows}.values())
        for key in ("cpu_s", "wall_s")
    )
    return (
        f"Machine: {m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 1e9:.0f} GB, "
        f"{rows[0]['date'][:10]}. Load average {min(loads):.1f} to {max(loads):.1f}; other "
        f"programs took {min(others):.0%} to {max(others):.0%} of a core. The run took {cpu:.0f} s "
        f"of CPU time in {wall:.0f} s."
    )
