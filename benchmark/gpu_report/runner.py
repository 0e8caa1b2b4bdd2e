"""Runs the checks one by one, each as a process of a session of its own with a time limit, and goes
on whatever happens to one of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.gpu_report import child, evidence, notes
from benchmark.gpu_report.checks import Check
from benchmark.gpu_report.notes import Gravity

_TAIL = 30
"""Lines of a check's output that the report keeps."""


@dataclass
class Outcome:
    """What became of a check."""

    name: str
    part: str
    answers: str
    status: str = "not run"
    """``passed``, ``found something``, ``failed``, ``hung``, ``crashed``, ``skipped`` or ``left
    out``."""
    why: str = ""
    """Why it was skipped or left out."""
    seconds: float = 0.0
    limit_s: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    """Names of its files."""
    tail: list[str] = field(default_factory=list)
    """Last lines of the output of a check that did not end well."""

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def left_out(check: Check, why: str) -> Outcome:
    return Outcome(check.name, check.part, check.answers, status="left out", why=why)


def run(check: Check, out: Path, launcher: Sequence[str], limit_s: float) -> Outcome:
    """Runs one check. ``launcher``: the command to which the check's name is appended."""
    outcome = Outcome(check.name, check.part, check.answers, limit_s=round(limit_s, 1))
    for old in out.glob(f"{check.file}.*"):
        old.unlink()
    log, began = out / f"{check.file}.log", time.monotonic()
    command = [*launcher, "--check", check.name, "--out", str(out)]
    hung, status = False, 0
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            hung = True
            evidence.ask(process, out, check)
            evidence.of_machine(out, check)
        finally:
            ended = evidence.kill(process)
    outcome.seconds = round(time.monotonic() - began, 1)
    rows = notes.read(child.rows_path(out, check))
    outcome.findings = [row for row in rows if "finding" in row]
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    if hung:
        outcome.status = "hung"
        outcome.findings.append(_hang(outcome, out, check, rows))
        if not ended:
            outcome.findings.append(_finding(Gravity.HANG, "the process cannot be killed"))
    elif status < 0:
        outcome.status = "crashed"
        where = _last_place(rows)
        outcome.findings.append(_finding(Gravity.CRASH, f"ended by signal {-status}", where))
    elif skipped:
        outcome.status, outcome.why = "skipped", skipped[-1]
    elif status != 0:
        outcome.status = "failed"
        if not any(row["finding"] == Gravity.ERROR for row in outcome.findings):
            said = f"exit status {status}"
            outcome.findings.append(_finding(Gravity.ERROR, said, _last_place(rows)))
    elif any(Gravity(row["finding"]).is_wrong for row in outcome.findings):
        outcome.status = "found something"
    else:
        outcome.status = "passed"
    if outcome.status in ("crashed", "failed"):
        evidence.of_machine(out, check)
    if outcome.status in ("hung", "crashed", "failed"):
        outcome.tail = log.read_text(errors="replace").splitlines()[-_TAIL:]
    outcome.evidence = evidence.files(out, check)
    return outcome


def _hang(outcome: Outcome, out: Path, check: Check, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A finding that says where the check hangs: what it said last, and in which stage its lanes
    are."""
    where, text = _last_place(rows), f"did not end within {outcome.limit_s:g} s"
    lanes = notes.read(child.status_path(out, check))
    running = [row for row in lanes if row.get("phase") == "RUNNING"]
    if running:
        where |= {key: running[0][key] for key in ("stage", "layer", "lane")}
    if lanes:
        text += f" (lanes: {'; '.join(child.lane_words(row) for row in lanes)})"
    return _finding(Gravity.HANG, text, where)


def _last_place(rows: list[dict[str, Any]]) -> dict[str, Any]:
    last = [row for row in rows if "at" in row][-1:]
    return dict(last[0]) if last else {}


def _finding(gravity: Gravity, what: str, where: dict[str, Any] | None = None) -> dict[str, Any]:
    where = dict(where or {})
    at = where.pop("at", "")
    return {"finding": gravity.value, "what": f"{what}; it did: {at}" if at else what} | where


def write_json(path: Path, value: Any) -> None:
    """Replaces a file at once, so that a killed run leaves a whole one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=2, default=str) + "\n")
    new.replace(path)
