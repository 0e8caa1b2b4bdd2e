"""Checks the models of the lanes, the command ring and the replay of steps with spin
(``apt-get install spin``; a C compiler beside it).

    python sgl-kernel-ext/model/check.py [--seconds 0.5]

Small deployments, a host with its loop, and a scheduler with ranks that die are searched
exhaustively (spin's partial-order reduction, states compressed). Then every deployment of 1 to 3
attention ranks, 1 to 3 FFN ranks and 1 to 4 lanes gets a search of bounded time over hashed states
(bitstate), in a random order: it visits hundreds of thousands of states of each, not all. Exit
status 1 when anything is found.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import psutil

_FOLDER = Path(__file__).parent
_LOOK_S = 0.05
"""Seconds between two looks at a bounded search."""


@dataclass(frozen=True)
class _Case:
    """What all cases have in common."""

    model: ClassVar[Path]

    def __str__(self) -> str:
        return " ".join(f"{value} {name.replace('_', ' ')}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Case(_Case):
    """One deployment, and what happens in it."""

    model: ClassVar[Path] = _FOLDER / "lanes.pml"
    attention_ranks: int
    ffn_ranks: int
    lanes: int
    steps: int
    """Number of steps of each attention rank."""
    layers: int
    """The largest number of layers of a step."""
    restarts: int


@dataclass(frozen=True)
class CommandCase(_Case):
    """One host with its loop."""

    model: ClassVar[Path] = _FOLDER / "commands.pml"
    lanes: int
    steps: int
    lease: int
    """Number of steps of a lease."""
    spare: int
    """Slots of the event ring beyond its reserve."""


@dataclass(frozen=True)
class ReplayCase(_Case):
    """A scheduler with attention ranks that die."""

    model: ClassVar[Path] = _FOLDER / "replay.pml"
    ranks: int
    requests: int
    tokens: int
    """Number of tokens of each request."""
    lease: int
    """Number of tokens of a lease."""
    restarts: int


@dataclass(frozen=True)
class Report:
    errors: int
    complaint: str
    """The first error in spin's words; empty when there is none."""
    states: int
    complete: bool
    """Whether the search ended by itself."""
    output: str


AnyCase = Case | CommandCase | ReplayCase

SMALL: list[AnyCase] = [
    Case(1, 1, 1, 2, 2, 1),
    Case(1, 1, 2, 2, 1, 1),
    Case(1, 2, 1, 1, 1, 1),
    Case(2, 1, 1, 1, 1, 0),
    CommandCase(1, 2, 2, 1),
    CommandCase(2, 1, 2, 1),
    ReplayCase(1, 1, 2, 2, 1),
    ReplayCase(1, 2, 2, 2, 1),
    ReplayCase(2, 1, 2, 2, 1),
    ReplayCase(2, 2, 1, 1, 1),
]
"""What the tests search, too: less than a second each."""
LARGE: list[AnyCase] = [
    Case(1, 1, 1, 2, 2, 2),
    Case(1, 1, 2, 2, 2, 1),
    Case(1, 2, 1, 2, 1, 1),
    Case(2, 1, 1, 1, 1, 1),
    Case(1, 1, 3, 3, 2, 0),
    Case(2, 2, 1, 1, 1, 0),
    CommandCase(1, 2, 3, 1),
    CommandCase(1, 2, 3, 2),
    CommandCase(2, 2, 2, 1),
    ReplayCase(1, 1, 2, 2, 2),
    ReplayCase(1, 2, 2, 2, 2),
    ReplayCase(2, 1, 2, 2, 2),
]
SWEEP = [
    Case(attention_ranks, ffn_ranks, lanes, lanes + 1, 2, 1)
    for attention_ranks, ffn_ranks, lanes in itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3, 4))
]


def available() -> bool:
    return shutil.which("spin") is not None and _compiler() is not None


def verify(case: AnyCase, text: str | None = None, seconds: float | None = None) -> Report:
    """Searches the model of ``case``, or ``text`` in its place, exhaustively, or its hashed states
    for about ``seconds`` of processor time, whatever else the machine does."""
    with tempfile.TemporaryDirectory(prefix="crosspool-spin-") as name:
        folder = Path(name)
        (folder / "model.pml").write_text(case.model.read_text() if text is None else text)
        defines = [f"-D{field.upper()}={value}" for field, value in asdict(case).items()]
        _run(["spin", "-a", *defines, "model.pml"], folder)
        options = ["-DCOLLAPSE"] if seconds is None else ["-DBITSTATE", "-DT_RAND", "-DP_RAND"]
        # Better code would save less of most searches than its compilation takes.
        _run([_compiler() or "cc", "-w", "-O0", "-DSAFETY", *options, "-o", "pan", "pan.c"], folder)
        search = ["-w22"] if seconds is None else ["-w27", f"-RS{hash(case) % 10**6}"]
        return _search([str(folder / "pan"), "-n", "-m1000000", *search], folder, seconds)


def sweep(cases: Sequence[Case], seconds: float) -> Iterator[tuple[Case, Report]]:
    """A bounded search of each of ``cases``, as many at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reports = pool.map(lambda case: verify(case, seconds=seconds), cases)
        yield from zip(cases, reports, strict=True)


def _compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def _search(command: list[str], folder: Path, seconds: float | None) -> Report:
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    complete = True
    while True:
        try:
            output, _ = process.communicate(timeout=None if seconds is None else _LOOK_S)
            break
        except subprocess.TimeoutExpired:
            used = psutil.Process(process.pid).cpu_times()
            if complete and used.user + used.system >= (seconds or 0.0):
                complete = False
                process.send_signal(signal.SIGINT)
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    if errors is None or states is None:
        raise RuntimeError(f"the output of spin's search has no result:\n{output}")
    complaint = re.search(r"^pan:\d+: (.*)$", output, re.MULTILINE)
    return Report(
        int(errors[1]), complaint[1] if complaint else "", int(states[1]), complete, output
    )


def _rows(seconds: float) -> Iterator[tuple[AnyCase, Report]]:
    for case in (*SMALL, *LARGE):
        yield case, verify(case)
    yield from sweep(SWEEP, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.5,
        help="Processor time of each bounded search, in seconds.",
    )
    seconds = parser.parse_args().seconds
    if not available():
        print("install spin and a C compiler (apt-get install spin gcc)", file=sys.stderr)
        return 2
    errors = 0
    for case, report in _rows(seconds):
        kind = "whole" if report.complete else "part"
        print(f"{case}: {report.errors} errors, {report.states} states ({kind})", flush=True)
        if report.errors:
            print(report.output, file=sys.stderr)
        errors += report.errors
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
