"""Measured figures as JSON rows, one per line, with the machine that they come from."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmark import machine
from benchmark.summary import Summary, summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
IMAGES = ROOT / "docs" / "images"


class Recorder:
    """Collects the rows of one benchmark."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.rows: list[dict[str, Any]] = []
        self._machine = machine.describe()
        self._date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def add(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        model: str = "all",
        parameters: dict[str, Any],
        cpu_s: float,
        wall_s: float,
        load1: float,
        **more: Any,
    ) -> Summary:
        """One figure: its median, 99th percentile and count.

        ``cpu_s``, ``wall_s``: what the measurement it comes from took; ``load1``: the load average
        before that."""
        summary = summarise(values)
        self.rows.append(
            {
                "benchmark": self.benchmark,
                "name": name,
                "model": model,
                "parameters": parameters,
                "unit": unit,
                "median": _short(summary.median),
                "p99": _short(summary.p99),
                "n": summary.n,
                **{key: _short(value) for key, value in more.items()},
                "load1": _short(load1),
                "cpu_s": _short(cpu_s),
                "wall_s": _short(wall_s),
                "date": self._date,
                "machine": self._machine,
            }
        )
        return summary

    def write(self, folder: Path = RESULTS) -> Path:
        """Replaces this benchmark's file of rows."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.jsonl"
        write_rows(path, self.rows)
        return path


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
