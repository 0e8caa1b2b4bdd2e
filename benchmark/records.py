"""Writes measured figures as JSON rows, one per line, with the machine that they come from."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmark import machine
from benchmark.summary import Summary, summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
IMAGES = ROOT / "docs" / "images"


class Recorder:
    """Collects the rows of one benchmark."""

    def __init__(
        self, benchmark: str, told: Callable[[dict[str, Any]], None] = lambda row: None
    ) -> None:
        """``told`` is called with every row as soon as it is added."""
        self.benchmark = benchmark
        self._told = told
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
        """Add a figure: median, 99th percentile and count of ``values``.

        ``cpu_s`` and ``wall_s`` are the seconds of CPU and wall time that the measurement took,
        ``load1`` is the load average before it."""
        summary = summarise(values)
        self._append(
            name=name,
            model=model,
            parameters=parameters,
            unit=unit,
            median=summary.median,
            p99=summary.p99,
            n=summary.n,
            **more,
            load1=load1,
            cpu_s=cpu_s,
            wall_s=wall_s,
        )
        return summary

    def add_steps(
        self,
        name: str,
        step_ms: Sequence[float],
        *,
        model: str,
        batch: int,
        context: int,
        threads: int,
        ratio_to: str | None,
        ratio: float | None,
        load1: float,
        cpu_s: float,
        wall_s: float,
        **more: Any,
    ) -> Summary:
        """Add the times of an engine's steps, in milliseconds. ``ratio`` is their median divided by
        that of the row named ``ratio_to``."""
        summary = summarise(step_ms)
        self._append(
            name=name,
            model=model,
            batch=batch,
            context=context,
            threads=threads,
            median_ms=summary.median,
            p99_ms=summary.p99,
            n=summary.n,
            ratio_to=ratio_to,
            ratio=ratio,
            load1=load1,
            cpu_s=cpu_s,
            wall_s=wall_s,
            **more,
        )
        return summary

    def _append(self, **fields: Any) -> None:
        row = {key: _short(value) for key, value in fields.items()}
        self.rows.append(
            {"benchmark": self.benchmark, **row, "date": self._date, "machine": self._machine}
        )
        self._told(self.rows[-1])

    def write(self, folder: Path = RESULTS) -> Path:
        """Replace this benchmark's file of rows."""
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
