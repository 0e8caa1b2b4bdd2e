"""Prints the tables of docs/results.md about processes that were killed, from the records.

python -m benchmark.chaos.kill_tables
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.records import RESULTS, read_rows

RECORDS = ("kills_bundled_resident", "kills_bundled_host", "kills_large_resident")
_COLUMNS = (
    *("placement", "killed", "answers", "cut", "failed", "other tokens"),
    *("median", "worst", "without kills"),
)
_PLACEMENTS = {
    "one-device": "one device",
    "two-devices": "two devices",
    "tp": "two FFN ranks, TP",
    "ep": "two FFN ranks, EP",
    "two-attention-ranks": "two attention ranks",
}
_KILLED = {
    "attention": "attention device",
    "FFN": "FFN device",
    "both": "device",
    "detokenizer": "detokenizer",
    "scheduler": "scheduler",
    "HTTP": "HTTP process",
}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of one record, a line for each of its rows. Pauses are in seconds."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)]
    return "".join(f"|{'|'.join(_padded(cell) for cell in line)}|\n" for line in lines)


def _padded(cell: str) -> str:
    return cell if cell == "---" else f" {cell} "


def _cells(row: dict[str, Any]) -> list[str]:
    outcomes = row["outcomes"]
    kind = row["name"].removeprefix("longest pause, ").removesuffix(" killed")
    counts = (row["answers"], *(outcomes.get(name, 0) for name in ("cut", "failed", "wrong")))
    pauses = (row["median"], row["worst"], row["without_kills"])
    return [
        _PLACEMENTS[row["parameters"]["placement"]],
        _KILLED[kind],
        *map(str, counts),
        *(f"{pause:.2f}" for pause in pauses),
    ]


def recorded(name: str, folder: Path = RESULTS) -> str:
    """Return the table of the record ``name``."""
    return markdown(read_rows(folder / f"{name}.jsonl"))


if __name__ == "__main__":
    for name in RECORDS:
        print(f"{name}\n\n{recorded(name)}")
