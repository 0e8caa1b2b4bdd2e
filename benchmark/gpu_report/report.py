"""The folder of a report: what became of every check, over all parts, and the files that are
written from it."""

from __future__ import annotations

import datetime
import json
import tarfile
from pathlib import Path
from typing import Any

from benchmark.gpu_report import child, notes, page, runner
from benchmark.gpu_report.checks import CHECKS, named
from benchmark.gpu_report.runner import Outcome


class Report:
    """The report in ``out``. One that is there already goes on: checks that run again replace their
    outcomes, the others stay."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.outcomes: dict[str, Outcome] = {}
        path = out / "report.json"
        if path.is_file():
            for row in json.loads(path.read_text())["checks"]:
                self.outcomes[row["name"]] = Outcome(**row)
        self.write()

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        self.write()

    def write(self) -> None:
        """Writes the page, and both files for programs."""
        outcomes = [
            self.outcomes.get(check.name, Outcome(check.name, check.part, check.answers))
            for check in CHECKS
        ]
        rows = {name: self._rows(name) for name in self.outcomes}
        facts = {
            row["fact"]: row["value"]
            for row in (*rows.get("machine", []), *rows.get("device", []))
            if "fact" in row and row["fact"] not in page.HIDDEN
        }
        platform = next(
            (row["value"] for of in rows.values() for row in of if row.get("fact") == "platform"),
            "no GPU was seen",
        )
        today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        told = {
            "platform": platform,
            "date": today,
            "machine": facts,
            "highest_rung": page.highest_rung(outcomes),
            "checks": [outcome.as_json() for outcome in outcomes if outcome.status != "not run"],
        }
        runner.write_json(self.out / "report.json", told)
        runner.write_json(self.out / "gpu_costs.json", self._costs(rows, platform))
        text = page.page(platform, today, facts, outcomes, rows)
        new = self.out / "report.new"
        new.write_text(text)
        new.replace(self.out / "report.md")

    def pack(self) -> Path:
        """Packs the folder's files into one beside it, which is easy to send; returns its path."""
        packed = self.out.parent / f"{self.out.name}.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            for file in sorted(path for path in self.out.iterdir() if path.is_file()):
                archive.add(file, f"{self.out.name}/{file.name}")
        return packed

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return notes.read(child.rows_path(self.out, named(name)))

    def _costs(self, rows: dict[str, list[dict[str, Any]]], platform: str) -> dict[str, Any]:
        from benchmark.gpu import cost_table

        measured = [row["measured"] for of in rows.values() for row in of if "measured" in row]
        return cost_table([row for row in measured if "parameters" in row], platform)
