"""Compares the rule by which the scheduler puts models to sleep with other rules and with the
optimum, over the arrivals of the Azure conversation trace.

    python -m benchmark.residency CONV.csv

Each request of the trace is for one of 30 models, drawn by Zipf's law with the exponent of the
models on OpenRouter. In one variant popularity is the same all the time; in the other, which model
is how popular is drawn anew every ten minutes. Models are of one size, or of the sizes of public
models. The least that any rule reads is Belady's optimum, or a bound of it where sizes differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from crosspool.planner.traffic.popularity import OPENROUTER_ALPHA, openrouter
from crosspool.planner.traffic.trace_files import read_trace
from crosspool.scheduler.worth import HALF_LIFE_PER_MODEL, RecentRate, Worth
from crosspool.simulator.rules import (
    FrequencyWithAging,
    GreedyDual,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
)
from crosspool.simulator.wakes import least_read, replay
from rich.console import Console
from rich.table import Table

from benchmark import machine, plots
from benchmark.records import IMAGES, RESULTS, Recorder, read_rows

MODELS = 30
CHANGE_SECONDS = 600.0
"""Time after which it is drawn anew which model is how popular."""
SHARES = (0.1, 0.2, 0.33, 0.5)
"""Weight pools, as shares of the bytes of all models."""
PUBLIC_GB = (58, 30, 57, 38, 229, 201, 90, 81, 13, 27)
"""FFN weights of public models in bfloat16 (gpt-oss as MXFP4), in GB: Qwen3-30B-A3B,
DeepSeek-V2-Lite, GLM-4.7-Flash, gpt-oss-20b, gpt-oss-120b, GLM-4.5-Air, Mixtral-8x7B, Phi-3.5-MoE,
OLMoE-1B-7B, Qwen1.5-MoE-A2.7B."""
RULES: dict[str, Callable[[list[int]], Worth]] = {
    "CrossPool": lambda sizes: RecentRate(HALF_LIFE_PER_MODEL * len(sizes)),
    "LFU": lambda sizes: LeastFrequentlyUsed(),
    "LFU with aging": lambda sizes: FrequencyWithAging(),
    "LRU": lambda sizes: LeastRecentlyUsed(),
    "GreedyDual": GreedyDual,
}

Floats = npt.NDArray[np.float64]


def recorded(trace: Path) -> Floats:
    """Arrival times in seconds. Raises ConfigError when the trace cannot be read."""
    arrival = read_trace(trace).arrival
    assert arrival is not None
    return np.asarray(arrival)


def popular(arrival: Floats, models: int, *, changing: bool, seed: int) -> list[int]:
    """The model that each request is for."""
    random = np.random.default_rng(seed)
    drawn = random.choice(models, size=len(arrival), p=openrouter(models))
    if changing:
        part = (arrival // CHANGE_SECONDS).astype(np.intp)
        names = np.array([random.permutation(models) for _ in range(part.max() + 1)])
        drawn = names[part, drawn]
    return [int(model) for model in drawn]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.residency", description=__doc__)
    parser.add_argument("trace", type=Path, metavar="CONV.csv")
    parser.add_argument("--plot", action="store_true", help="only plot what was recorded")
    given = parser.parse_args(words)
    recorder = Recorder("residency")
    if not given.plot:
        console = Console()
        table = Table("popularity", "sizes", "pool", *RULES)
        arrival = recorded(given.trace)
        public = np.random.default_rng(0).choice(PUBLIC_GB, size=MODELS)
        for changing in (False, True):
            asked = popular(arrival, MODELS, changing=changing, seed=0)
            for kind, sizes in (("one", [1] * MODELS), ("public", [int(size) for size in public])):
                variant = {"popularity": "changing" if changing else "steady", "sizes": kind}
                for share in SHARES:
                    table.add_row(*_compare(recorder, variant, asked, sizes, share))
        console.print(table)
        console.print(f"rows: {recorder.write()}")
    plot()
    return 0


def _compare(
    recorder: Recorder, variant: dict[str, str], asked: list[int], sizes: list[int], share: float
) -> list[str]:
    """Records bytes read by each rule over the least that any reads; returns a row to print."""
    budget = max(round(share * sum(sizes)), *sizes)
    load1, cpu, wall = machine.load1(), time.process_time(), time.monotonic()
    least = least_read(asked, sizes, budget)
    shown = [*variant.values(), f"{share:.0%}"]
    for name, rule in RULES.items():
        found = replay(asked, sizes, budget, rule(sizes))
        recorder.add(
            name, [found.read_bytes / least], "of the least bytes",
            parameters={
                "models": MODELS, "requests": len(asked), "alpha": OPENROUTER_ALPHA,
                **variant, "pool": share, "budget": budget,
            },
            cpu_s=time.process_time() - cpu, wall_s=time.monotonic() - wall, load1=load1,
            wakes=found.number, read=found.read_bytes, least_read=least,
        )  # fmt: skip
        shown.append(f"{found.read_bytes / least:.2f} ({found.number:,.0f} wakes)")
    return shown


def plot() -> None:
    """Plots the recorded rows."""
    rows = read_rows(RESULTS / "residency.jsonl")
    variants = [(p, s) for s in ("one", "public") for p in ("steady", "changing")]
    titles = [
        f"{popularity} popularity, {'models of one size' if sizes == 'one' else 'public sizes'}"
        for popularity, sizes in variants
    ]
    figure, axes = plots.panels(titles)
    for axis, (popularity, sizes) in zip(axes, variants, strict=True):
        for color, name in zip(plots.COLORS, RULES, strict=True):
            points = [
                (100 * row["parameters"]["pool"], row["median"])
                for row in rows
                if row["name"] == name
                and row["parameters"]["popularity"] == popularity
                and row["parameters"]["sizes"] == sizes
            ]
            axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=name)
        axis.set_xlabel("weight pool, % of all models' bytes", fontsize=8)
        axis.set_ylabel("bytes read / least", fontsize=8)
        axis.set_ylim(bottom=1.0)
    axes[0].legend(fontsize=7, frameon=False)
    plots.save(figure, IMAGES / "residency.svg")


if __name__ == "__main__":
    sys.exit(main())
