"""Tells everything about a GPU that nobody has seen: does CrossPool's GPU path work, how fast is
it, does it keep working?

    python -m benchmark.gpu_report [--part a|b|c] [--out DIR] [--only CHECK ...]

Three parts of under nine minutes each, which add up in one folder: ``report.md`` is the page to
read first, ``report.json`` says the same to programs, ``gpu_costs.json`` is what a simulator reads;
at the end of a part the folder is packed into one file beside it.
Both are written anew after every check. A check that hangs, crashes or fails is reported, with what
was seen of it, and the next one runs; the exit status is 0 when the report was written.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.gpu_report import child, runner
from benchmark.gpu_report.checks import CHECKS, PART_SECONDS, PARTS, Check, named
from benchmark.gpu_report.platform import CudaPlatform, Platform
from benchmark.gpu_report.report import Report
from benchmark.records import RESULTS

_LEAST_S = 10.0
"""Seconds without which no check begins."""
_EVIDENCE_S = 30.0
"""Seconds of a part for the evidence of a check that hangs."""


def main(
    words: Sequence[str] | None = None,
    make: Callable[[], Platform] = CudaPlatform,
    launcher: Sequence[str] = (sys.executable, "-P", "-m", "benchmark.gpu_report"),
) -> int:
    """Runs the report, or with ``--check`` a single check in this process.

    ``make``: makes the platform, in the processes of checks alone; ``launcher``: the command that
    comes here again."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="checks: " + ", ".join(check.name for check in CHECKS),
    )
    parser.add_argument("--part", choices=sorted(PARTS), help="all, one after the other")
    parser.add_argument("--out", type=Path, help="benchmark/results/gpu_report/<gpu> unless given")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="run these alone")
    parser.add_argument(
        "--limit",
        nargs="+",
        default=[],
        metavar="CHECK=SECONDS",
        help="other time limits than the checks' own",
    )
    parser.add_argument("--check", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    try:
        only = [named(name) for name in given.only or []]
        limits = {named(name): float(s) for name, _, s in (w.rpartition("=") for w in given.limit)}
    except (KeyError, ValueError) as error:
        parser.error(str(error))
    out: Path = given.out or RESULTS / "gpu_report" / _gpu_name()
    out.mkdir(parents=True, exist_ok=True)
    if given.check:
        status = child.run(named(given.check), make, out)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what is left of a loop that hangs would hold the process up
    report = Report(out)
    for part in [given.part] if given.part else sorted(PARTS):
        checks = [check for check in only or CHECKS if check.part == part]
        _run(part, checks, report, launcher, limits)
    print(f"read {out / 'report.md'}; all of it is packed in {report.pack()}")
    return 0


def _run(
    part: str,
    checks: Sequence[Check],
    report: Report,
    launcher: Sequence[str],
    limits: dict[Check, float],
) -> None:
    deadline = time.monotonic() + PART_SECONDS - _EVIDENCE_S
    for check in checks:
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            why = f"the {PART_SECONDS:.0f} s of part {part} are spent"
            outcome = runner.left_out(check, why)
        else:
            print(f"{part} {check.name:22}", end="", flush=True)
            limit = min(limits.get(check, check.seconds), left)
            outcome = runner.run(check, report.out, launcher, limit)
            print(f"{outcome.status:16}{outcome.seconds:6.1f} s", flush=True)
        report.add(outcome)


def _gpu_name() -> str:
    """Name of the first GPU as a folder's name; ``none`` where ``nvidia-smi`` names none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "none"
    first = next(iter(done.stdout.splitlines()), "none")
    return re.sub(r"[^a-z0-9]+", "_", first.strip().lower())


if __name__ == "__main__":
    sys.exit(main())
