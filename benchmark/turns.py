"""Takes measurements that are compared in turns, so that what else the machine does affects all of
them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import psutil
from rich import box
from rich.progress import Progress
from rich.table import Table

from benchmark import machine
from benchmark.records import Recorder
from benchmark.summary import quantile


@dataclass(frozen=True)
class Measured:
    """Result of one turn."""

    ms: list[float]
    """Times in ms of single steps, or of other things that are measured."""
    cpu_s: float
    """CPU seconds of the steps, without what came before them."""
    wall_s: float
    """Wall seconds of the steps, likewise."""


@dataclass
class Case:
    """Something to measure, and its results so far."""

    name: str
    take: Callable[[], Measured]
    model: str
    batch: int
    context: int
    threads: int
    models: int = 1
    """Number of models that run at once."""
    turns: list[Measured] = field(default_factory=list)
    load1: float = 0.0
    """Highest load average at the start of a turn."""
    other_cpu_s: float = 0.0
    """CPU seconds of all other processes than this one and its children."""
    took_s: float = 0.0
    """Wall seconds of all turns, with what came before their steps."""

    @property
    def ms(self) -> list[float]:
        return [ms for turn in self.turns for ms in turn.ms]

    @property
    def median(self) -> float:
        return quantile(self.ms, 0.5)

    @property
    def mean(self) -> float:
        """Mean of the times. Bursts of results, or other processes, put it far above the median."""
        return fmean(self.ms)

    @property
    def p99(self) -> float:
        return quantile(self.ms, 0.99)

    @property
    def other_cpu_share(self) -> float:
        """CPU time of other processes, as a share of one core."""
        return self.other_cpu_s / self.took_s

    def over(self, other: Case) -> float:
        """Return the median, over all turns, of this case's median divided by the other's."""
        return median(
            quantile(own.ms, 0.5) / quantile(theirs.ms, 0.5)
            for own, theirs in zip(self.turns, other.turns, strict=True)
        )


def take_turns(cases: Sequence[Case], rounds: int, progress: Progress) -> None:
    """Measure every case once in each round, forwards and backwards by turns. A first round does
    not count."""
    task = progress.add_task("", total=(rounds + 1) * len(cases))
    for turn in range(-1, rounds):
        for case in cases[:: -1 if turn % 2 else 1]:
            progress.update(task, description=f"round {turn + 1} of {rounds}: {case.name}")
            load1, before = machine.load1(), _now()
            measured = case.take()
            wall, busy, own = (after - b for after, b in zip(_now(), before, strict=True))
            if turn >= 0:
                case.turns.append(measured)
                case.load1 = max(case.load1, load1)
                case.other_cpu_s += max(0.0, busy - own)
                case.took_s += wall
            progress.advance(task)
    progress.remove_task(task)


def _now() -> tuple[float, float, float]:
    """Return wall time, CPU seconds of all processes, and those of this one and its children."""
    this = psutil.Process()
    own = 0.0
    for process in (this, *this.children(recursive=True)):
        times = process.cpu_times()
        own += times.user + times.system
    return time.perf_counter(), machine.busy_seconds(), own


@dataclass(frozen=True)
class Comparison:
    """A case, and the one that it is compared with."""

    case: Case
    to: Case | None = None
    limit: float | None = None
    """Highest ratio that is still good."""

    @property
    def ratio(self) -> float | None:
        return None if self.to is None else self.case.over(self.to)


def record(recorder: Recorder, comparison: Comparison, **more: Any) -> None:
    to = comparison.to
    record_case(
        recorder,
        comparison.case,
        ratio_to=None if to is None else to.name,
        ratio=comparison.ratio,
        limit=comparison.limit,
        **more,
    )


def record_case(
    recorder: Recorder, case: Case, *, ratio_to: str | None, ratio: float | None, **more: Any
) -> None:
    recorder.add_steps(
        case.name,
        case.ms,
        model=case.model,
        models=case.models,
        batch=case.batch,
        context=case.context,
        threads=case.threads,
        ratio_to=ratio_to,
        ratio=ratio,
        load1=case.load1,
        cpu_s=sum(turn.cpu_s for turn in case.turns),
        wall_s=sum(turn.wall_s for turn in case.turns),
        mean_ms=case.mean,
        medians_ms=[round(quantile(turn.ms, 0.5), 4) for turn in case.turns],
        other_cpu_share=case.other_cpu_share,
        **more,
    )


def table(title: str, comparisons: Sequence[Comparison]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    for name in (
        *("models", "batch", "context", "threads", "median\nms", "mean\nms", "P99\nms"),
        "P99 /\nmedian",
    ):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("ratio", justify="right", no_wrap=True)
    made.add_column("to", no_wrap=True)
    for name in ("cores\nin use", "others'\nCPU"):
        made.add_column(name, justify="right", no_wrap=True)
    for comparison in comparisons:
        case, ratio, limit = comparison.case, comparison.ratio, comparison.limit
        cpu, wall = (sum(getattr(t, f) for t in case.turns) for f in ("cpu_s", "wall_s"))
        shown = "" if ratio is None else f"{ratio:.2f}"
        if ratio is not None and limit is not None:
            style = "green" if ratio <= limit else "red"
            shown = f"[{style}]{shown}[/] (<= {limit:g})"
        made.add_row(
            case.name,
            str(case.models),
            str(case.batch or ""),
            str(case.context or ""),
            str(case.threads),
            f"{case.median:.2f}",
            f"{case.mean:.2f}",
            f"{case.p99:.2f}",
            f"{case.p99 / case.median:.2f}",
            shown,
            "" if comparison.to is None else comparison.to.name,
            f"{cpu / wall:.2f}",
            f"{case.other_cpu_share:.0%}",
        )
    return made
