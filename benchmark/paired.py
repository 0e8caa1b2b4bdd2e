"""Compares two checkouts, each with its own build, in turns.

    python -m benchmark.paired OLD [NEW] [--kinds engine http] [--starts 3] [--rounds 8] [--quick]

OLD and NEW (this one unless given) are folders of checkouts in which `make dev` has run. Both run
at once and are measured in turns: old, new, new, old, and so on. Every old one and the new one next
to it make a pair, so that what else the machine does affects both alike. Each start begins with new
processes, since two processes of one program differ, too. For every figure the table gives the
median over all pairs of new divided by old, and the interval in which it lies with a confidence of
95 % (bootstrap over pairs). All figures are times: less than 1 is better. Two engines need 8 GB of
memory.

The exit status is 1 if the lower end of an interval is above ``--limit``: then the new checkout is
slower. One whose upper ends are all below it is shown to be within the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crosspool.config.process import die_with_parent
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark import machine
from benchmark.records import ROOT, Recorder

SIDE = Path(__file__).with_name("paired_side.py")
KINDS = ("engine", "http")
PLANS: dict[str, dict[str, Any]] = {
    "engine": {"tiny": False, "steps": 60, "batch": 8},
    "http": {"tiny": False, "requests": 24, "at_once": 4},
}
QUICK: dict[str, dict[str, Any]] = {
    "engine": {"tiny": True, "steps": 20, "batch": 2},
    "http": {"tiny": True, "requests": 4, "at_once": 2},
}
_RESAMPLES = 10_000
_CONFIDENCE = 0.95


class Side:
    """A checkout under measurement."""

    def __init__(self, checkout: Path, kind: str, plan: dict[str, Any]) -> None:
        python = checkout / ".venv" / "bin" / "python"
        path = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [str(python), "-P", str(SIDE), kind, json.dumps(plan)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        self._name = f"{kind} of {checkout}"

    def read(self) -> dict[str, float]:
        """Return the next line. Raises RuntimeError when the program has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with {self._process.wait()}")
        return dict(json.loads(line))

    def measure(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def both_sides(old: Path, new: Path, kind: str, plan: dict[str, Any]) -> Iterator[list[Side]]:
    """Start both, one after the other, and end both."""
    with ExitStack() as stack:
        sides = []
        for checkout in (old, new):
            sides.append(Side(checkout, kind, plan))
            stack.callback(sides[-1].close)
            sides[-1].read()
        yield sides


@dataclass(frozen=True)
class Ratio:
    """A figure of the new checkout divided by that of the old one."""

    name: str
    old: float
    """Median over all turns; so is ``new``."""
    new: float
    ratios: list[float]
    """One for each pair."""
    median: float
    low: float
    """Lower end of the interval of confidence of the median; ``high`` is the upper one."""
    high: float


def ratio_of(name: str, olds: Sequence[float], news: Sequence[float]) -> Ratio:
    """``olds`` and ``news``: of each pair, in the same order."""
    logs = np.log(np.asarray(news) / np.asarray(olds))
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(logs, (_RESAMPLES, len(logs))), axis=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.exp(np.quantile(medians, [tail, 1 - tail]))
    return Ratio(
        name,
        float(np.median(olds)),
        float(np.median(news)),
        np.exp(logs).tolist(),
        float(np.exp(np.median(logs))),
        float(low),
        float(high),
    )


def pairs_of(sides: Sequence[Side], rounds: int) -> Iterator[list[dict[str, float]]]:
    """Yield what the old side and the new one measured, pair by pair: two for each round."""
    for turn in range(2 * rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        took = {side: sides[side].measure() for side in order}
        yield [took[0], took[1]]


def measured(
    old: Path,
    new: Path,
    kind: str,
    plan: dict[str, Any],
    *,
    starts: int,
    rounds: int,
    console: Console,
) -> list[list[dict[str, float]]]:
    """Return the pairs of all starts."""
    pairs: list[list[dict[str, float]]] = []
    with Progress(console=console, refresh_per_second=2) as progress:
        task = progress.add_task("", total=starts * 2 * rounds)
        for start in range(starts):
            progress.update(task, description=f"{kind}, start {start + 1} of {starts}")
            with both_sides(old, new, kind, plan) as sides:
                for pair in pairs_of(sides, rounds):
                    pairs.append(pair)
                    progress.advance(task)
    return pairs


def table(ratios: Sequence[Ratio], title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("", "old", "new", "new / old", "95 % confidence", "pairs"):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for ratio in ratios:
        interval = f"{ratio.low:.4f} to {ratio.high:.4f}"
        values = (f"{ratio.old:.4g}", f"{ratio.new:.4g}", f"{ratio.median:.4f}", interval)
        made.add_row(ratio.name, *values, str(len(ratio.ratios)))
    return made


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.paired", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="of four turns each, in every start")
    parser.add_argument("--limit", type=float, default=1.01, help="highest good ratio")
    parser.add_argument("--results", type=Path, help="folder of the records")
    parser.add_argument("--quick", action="store_true", help="tiny models; records nothing")
    given = parser.parse_args(words)
    starts, rounds = (1, 1) if given.quick else (given.starts, given.rounds)
    plans = QUICK if given.quick else PLANS
    old, new = given.old.resolve(), given.new.resolve()
    for checkout in (old, new):
        if not (checkout / ".venv" / "bin" / "python").exists():
            parser.error(f"{checkout} has no .venv: run `make dev` there")
    console, recorder, found = Console(width=120), Recorder("paired"), list[Ratio]()
    for kind in given.kinds:
        load1, busy, began = machine.load1(), machine.busy_seconds(), time.perf_counter()
        pairs = measured(old, new, kind, plans[kind], starts=starts, rounds=rounds, console=console)
        ratios = [
            ratio_of(name, *([pair[side][name] for pair in pairs] for side in (0, 1)))
            for name in pairs[0][0]
        ]
        for ratio in ratios:
            recorder.add(
                ratio.name,
                ratio.ratios,
                "new / old",
                parameters={**plans[kind], "starts": starts, "rounds": rounds},
                cpu_s=machine.busy_seconds() - busy,
                wall_s=time.perf_counter() - began,
                load1=load1,
                old=ratio.old,
                new=ratio.new,
                ratio=ratio.median,
                confidence=[ratio.low, ratio.high],
                limit=given.limit,
            )
        found += ratios
        console.print(table(ratios, f"{kind}: {new} (new) beside {old} (old)"))
    if not given.quick:
        recorder.write(given.results) if given.results else recorder.write()
    return int(any(ratio.low > given.limit for ratio in found))


if __name__ == "__main__":
    sys.exit(main())
