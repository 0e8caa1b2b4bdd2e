"""Reports a run of Figure 7: rows, ratios beside the paper's, records, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmark import plots
from benchmark.baselines import TITLES, WAYS, Way
from benchmark.client import Replay
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total

PAPER_MONOLITHIC = {0.8: (7.3, 10.4), 1.0: (2.1, 5.0)}
"""Least and most of the paper's P99 under kvcached over that of CrossPool, as stated, by rate."""
PAPER_STATIC = (1.7, 5.7)
"""The paper's P99 of CrossPool over that of static partition: least and most, as stated."""


@dataclass(frozen=True)
class Phase:
    """One rate under one placement in one round."""

    way: str
    share: float
    round: int
    replay: Replay
    usage: Usage

    @property
    def tbt(self) -> list[float]:
        return [gap for answer in self.replay.answers for gap in answer.tbt]

    @property
    def ttft(self) -> list[float]:
        return [answer.ttft for answer in self.replay.answers]


@dataclass(frozen=True)
class Row:
    """All rounds of one rate under one placement."""

    way: str
    share: float
    tbt: list[float]
    """Seconds between tokens, of all rounds together."""
    ttft: list[float]
    p99_by_round: list[float]
    """P99 of the seconds between tokens, by round."""
    usage: dict[str, Any]
    """Fields of the machine's use that every record has."""

    @property
    def p99(self) -> float:
        return quantile(self.tbt, 0.99)


def rows_of(phases: Sequence[Phase]) -> list[Row]:
    found = []
    for way in WAYS:
        for share in sorted({phase.share for phase in phases}):
            own = sorted(
                (p for p in phases if (p.way, p.share) == (way, share)), key=lambda p: p.round
            )
            if own:
                found.append(
                    Row(
                        way,
                        share,
                        [gap for phase in own for gap in phase.tbt],
                        [first for phase in own for first in phase.ttft],
                        [quantile(phase.tbt, 0.99) for phase in own],
                        total([phase.usage for phase in own]),
                    )
                )
    return found


def ratio(rows: Sequence[Row], way: str, over: str, share: float) -> tuple[float, list[float]]:
    """Return P99 under ``way`` over that under ``over`` at one rate: the median of the rounds'
    ratios, and these."""
    one, other = (
        next(row for row in rows if (row.way, row.share) == (each, share)) for each in (way, over)
    )
    by_round = [a / b for a, b in zip(one.p99_by_round, other.p99_by_round, strict=True)]
    return median(by_round), by_round


def record(rows: Sequence[Row], constant: dict[str, Any]) -> Recorder:
    recorder = Recorder("figure7")
    for row in rows:
        common: dict[str, Any] = {
            "parameters": {"way": row.way, "share": row.share, **constant},
            **row.usage,
        }
        over = ratio(rows, row.way, "crosspool", row.share)
        recorder.add(
            "tbt",
            row.tbt,
            "s",
            **common,
            p95=quantile(row.tbt, 0.95),
            p99_by_round=[round(p99, 6) for p99 in row.p99_by_round],
            ratio_to="crosspool",
            ratio_p99=over[0],
            ratio_p99_by_round=[round(each, 4) for each in over[1]],
        )
        recorder.add("ttft", row.ttft, "s", **common)
    return recorder


def table(rows: Sequence[Row], saturation: Mapping[Way, float]) -> Table:
    told = ", ".join(f"{TITLES[way]} {rate:.2f}" for way, rate in saturation.items())
    made = Table(
        title=f"Saturation, requests/s of each model: {told}", title_justify="left", box=box.SIMPLE
    )
    made.add_column("", no_wrap=True)
    for title in (
        *(
            "rate, of\nsaturation",
            "TBT P50\nms",
            "P95",
            "P99",
            "P99 by round",
            "P99 over\nCrossPool",
        ),
        *("TTFT P50\nms", "tokens", "load", "CPU s", "others'\nCPU"),
    ):
        made.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        tbt = [f"{1e3 * quantile(row.tbt, q):.1f}" for q in (0.5, 0.95, 0.99)]
        made.add_row(
            TITLES[row.way],
            f"{row.share:g}",
            *tbt,
            ", ".join(f"{1e3 * p99:.1f}" for p99 in row.p99_by_round),
            f"{ratio(rows, row.way, 'crosspool', row.share)[0]:.2f}",
            f"{1e3 * quantile(row.ttft, 0.5):.0f}",
            f"{len(row.tbt)}",
            f"{row.usage['load1']:.1f}",
            f"{row.usage['cpu_s']:.0f}",
            f"{row.usage['other_cpu_share']:.0%}",
        )
    return made


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return our ratios beside the paper's, one line each."""
    lines = []
    for share in sorted({row.share for row in rows}):
        ways = [w for w in ("monolithic_cut", "monolithic_whole") if _has(rows, w, share)]
        for way in ways:
            low, high = PAPER_MONOLITHIC.get(share, (None, None))
            paper = f"; the paper's {low:g} to {high:g}" if low and high else ""
            found, by_round = ratio(rows, way, "crosspool", share)
            lines.append(
                f"at {share:g}: P99 of {TITLES[way]} is {found:.2f} times CrossPool's "
                f"({_list(by_round)}){paper}"
            )
        if _has(rows, "static", share):
            found, by_round = ratio(rows, "crosspool", "static", share)
            lines.append(
                f"at {share:g}: P99 of CrossPool is {found:.2f} times that of static partition "
                f"({_list(by_round)}); the paper's {PAPER_STATIC[0]:g} to {PAPER_STATIC[1]:g}"
            )
    return lines


def _has(rows: Sequence[Row], way: str, share: float) -> bool:
    return any((row.way, row.share) == (way, share) for row in rows)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot P99 against the rate, and the distribution at the rate of the paper's bad regime."""
    shown = max((row.share for row in rows if row.share <= 0.8), default=rows[0].share)
    figure, (tail, spread) = plots.panels(
        ("P99 time between tokens, ms", f"Time between tokens at {shown:g} of saturation: CDF")
    )
    for way, color in zip(WAYS, plots.COLORS, strict=False):
        own = [row for row in rows if row.way == way]
        tail.plot(
            [row.share for row in own],
            [1e3 * row.p99 for row in own],
            "-o",
            color=color,
            label=TITLES[way],
            markersize=3,
        )
        for row in own:
            if row.share == shown:
                q = np.linspace(0.0, 1.0, 500)
                spread.plot(1e3 * np.quantile(row.tbt, q), q, color=color, label=TITLES[way])
    tail.set_xlabel("rate, of the lowest saturation", fontsize=8)
    tail.set_ylim(bottom=0)
    spread.set_xscale("log")
    spread.set_xlabel("ms", fontsize=8)
    for axis in (tail, spread):
        axis.legend(fontsize=7, frameon=False)
    plots.save(figure, path)
