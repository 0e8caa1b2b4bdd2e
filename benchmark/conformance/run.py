"""Runs another project's tests over CrossPool servers, and tells what failed and why."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import machine
from benchmark.conformance.known import Known, reason_for
from benchmark.conformance.servers import free_port
from benchmark.records import RESULTS, ROOT
from benchmark.server import DEMO, TINY_MODELS

LIMIT = 120
"""Time in seconds that one test may take."""


@dataclass(frozen=True)
class Project:
    """Whose tests are run, and how."""

    name: str
    plugin: str
    """The pytest plugin under which they run."""
    suites: Mapping[str, Sequence[str]]
    """Files of each suite, from the root of a checkout."""
    known: Sequence[Known]


def main(project: Project, words: Sequence[str] | None = None) -> int:
    """Return 0 where every failure has a known reason, 1 where one has none or a file of the
    suites is missing."""
    arguments = _parse(project, words)
    suites = {name: project.suites[name] for name in arguments.suite or project.suites}
    checkout: Path = arguments.checkout.resolve()
    files = [checkout / file for files in suites.values() for file in files]
    missing = [file for file in files if not file.is_file()]
    if missing:
        print(f"{checkout} lacks {', '.join(map(str, missing))}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        _run(project, arguments, checkout, files, outcomes)
        rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    rows = [_explained(project, checkout, suites, row) for row in rows]
    print(table(rows))
    if arguments.record is not None:
        record = {"project": project.name, "model": arguments.model, "machine": machine.describe()}
        arguments.record.write_text(json.dumps({**record, "tests": rows}, indent=1) + "\n")
    return int(any(row["outcome"] == "failed" and row["reason"] is None for row in rows))


def _parse(project: Project, words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmark.conformance.{project.name.lower()}",
        description=f"Runs {project.name}'s own tests over CrossPool servers of bundled models.",
    )
    parser.add_argument("--checkout", type=Path, required=True, help=f"{project.name}'s sources")
    parser.add_argument("--suite", action="append", choices=list(project.suites))
    parser.add_argument("--model", choices=TINY_MODELS, default=TINY_MODELS[0])
    parser.add_argument("-k", dest="only", help="as pytest's -k")
    parser.add_argument("--log", type=Path, help="file that gets pytest's output")
    parser.add_argument(
        "--record", type=Path, help=f"file that gets the outcomes: {RESULTS}/conformance_*.json"
    )
    return parser.parse_args(words)


def _run(
    project: Project,
    arguments: argparse.Namespace,
    checkout: Path,
    files: Sequence[Path],
    outcomes: Path,
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
    # Nothing of the checkout's own settings: they are for its machines.
    command += ["-c", "/dev/null", "--rootdir", str(checkout), "--noconftest"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "-p", project.plugin]
    command += ["--conformance-checkout", str(checkout), "--conformance-outcomes", str(outcomes)]
    command += ["--conformance-model", str(DEMO / arguments.model)]
    command += ["--conformance-port", str(free_port()), "--conformance-limit", str(LIMIT)]
    for one in project.known:
        if not one.run:
            command += ["--conformance-leave-out", one.tests]
    if arguments.only:
        command += ["-k", arguments.only]
    log: Path = arguments.log or outcomes.with_suffix(".log")
    with log.open("wb") as output:
        command += map(str, files)  # failures are read from the outcomes
        subprocess.run(command, check=False, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    if not outcomes.exists():
        raise SystemExit(f"pytest ran no test:\n{log.read_text()[-4000:]}")


def _explained(
    project: Project, checkout: Path, suites: Mapping[str, Sequence[str]], row: dict[str, Any]
) -> dict[str, Any]:
    """The row of a test with its suite and, for a failure, its reason."""
    file = row["test"].partition("::")[0]
    suite = next(name for name, files in suites.items() if file in files)
    found = None
    if row["outcome"] == "failed":
        found = reason_for(project.known, row["test"], row["message"])
    elif row["outcome"] == "left out":
        found = next(one for one in project.known if not one.run and one.names(row["test"]))
    reason = None if found is None else f"{found.reason}: {found.why}"
    message = row["message"].replace(f"{checkout}/", "").replace(f"{ROOT}/", "")
    return {"suite": suite, **row, "message": message, "reason": reason}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line per test that did not pass, and one per suite with its counts."""
    lines = []
    for row in rows:
        if row["outcome"] in {"failed", "left out"}:
            why = row["reason"] or f"UNKNOWN: {row['message']}"
            lines.append(f"{row['outcome']:9}{row['test']}\n         {why}")
        elif row["outcome"] == "skipped":
            lines.append(f"skipped  {row['test']}\n         {row['message']}")
    lines.append(_line("suite", "passed", "failed", "unknown", "skipped", "left out"))
    for suite in dict.fromkeys(row["suite"] for row in rows):
        lines.append(_counts(suite, [row for row in rows if row["suite"] == suite]))
    lines.append(_counts("all", rows))
    return "\n".join(lines)


def _counts(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    count = Counter(row["outcome"] for row in rows)
    count["unknown"] = sum(row["outcome"] == "failed" and row["reason"] is None for row in rows)
    columns = ("passed", "failed", "unknown", "skipped", "left out")
    return _line(name, *(count[column] for column in columns))


def _line(name: str, *columns: object) -> str:
    return f"{name:22}" + "".join(f"{column:>10}" for column in columns)
