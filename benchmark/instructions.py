"""Checks that the native code needs no more instructions than recorded: callgrind counts those of
fixed kernel calls, and of a decode step of a tiny model through the resident loop. Unlike times,
the counts hardly depend on the machine and its load; they do depend on the compiler.

    python -m benchmark.instructions            # exit status 1 when a count has grown
    python -m benchmark.instructions --record   # after an intended change

Valgrind knows no AVX512, so the avx2 and the portable path are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crosspool.kernels.isa import available_isas
from rich.console import Console
from rich.table import Table

from benchmark.programs import build
from benchmark.records import RESULTS, ROOT

RECORD = RESULTS / "instructions.json"
ISAS = ("portable", "avx2")
TOLERANCE = 0.03
_STEPS = (20, 60)
"""Steps of a short and of a long run. Their difference leaves out the start of the program."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.instructions", description=__doc__)
    parser.add_argument(
        "--record", action="store_true", help=f"Write the counts to {RECORD.relative_to(ROOT)}."
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="Relative growth of a count that passes."
    )
    given = parser.parse_args(words)
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    counts = count()
    if given.record:
        RECORD.write_text(json.dumps(counts, indent=1) + "\n")
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    grown = compare(counts, recorded, given.tolerance)
    Console().print(_table(counts, recorded, grown))
    return 1 if grown else 0


def compare(counts: dict[str, int], recorded: dict[str, int], tolerance: float) -> list[str]:
    """Returns the cases that need more instructions than recorded, and those without a record."""
    return [
        name
        for name, value in counts.items()
        if name not in recorded or value > recorded[name] * (1 + tolerance)
    ]


def count() -> dict[str, int]:
    """Counts the instructions of each case: "path: kernel rows dtype" or "path: decode step"."""
    program = build("instructions")
    counts: dict[str, int] = {}
    isas = [isa for isa in ISAS if isa in available_isas()]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        kernels = [pool.submit(_kernels, program, isa) for isa in isas]
        steps = [[pool.submit(_engine, program, isa, n) for n in _STEPS] for isa in isas]
        for isa, cases, (short, long) in zip(isas, kernels, steps, strict=True):
            for name, value in cases.result().items():
                counts[f"{isa}: {name}"] = value
            each = (long.result() - short.result()) / (_STEPS[1] - _STEPS[0])
            counts[f"{isa}: decode step"] = round(each)
    return counts


def _kernels(program: Path, isa: str) -> dict[str, int]:
    """Counts by kernel call: each call of the program's function `counted` leaves a profile."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "profile")
        options = ["--toggle-collect=counted", "--dump-after=counted"]
        names = _callgrind(out, [*options, str(program), "kernels"], isa).splitlines()
        profiles = [Path(f"{out}.{index + 1}") for index in range(len(names))]
        return {name: _total(path) for name, path in zip(names, profiles, strict=True)}


def _engine(program: Path, isa: str, steps: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "profile")
        _callgrind(out, [str(program), "engine", str(steps)], isa)
        return _total(out)


def _callgrind(out: Path, words: Sequence[str], isa: str) -> str:
    """Runs a program; returns what it printed."""
    command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}", *words]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "CROSSPOOL_CPU_ISA": isa},
    )
    return done.stdout


def _total(profile: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)", profile.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"callgrind wrote no total to {profile.name}")
    return int(found[1])


def _table(counts: dict[str, int], recorded: dict[str, int], grown: Sequence[str]) -> Table:
    table = Table("case", "instructions", "recorded", "change", title="instructions of one call")
    for name, value in counts.items():
        before = recorded.get(name)
        told = ["", ""]
        if before is not None:
            told = [f"{before:,}", f"{100 * (value / before - 1):+.1f} %"]
        table.add_row(name, f"{value:,}", *told, style="bold red" if name in grown else None)
    return table


if __name__ == "__main__":
    sys.exit(main())
