"""The KV pool that the Azure traces need when many models share their requests.

    python -m benchmark.azure_pool CONVERSATION.csv CODE.csv [--models 30] [--deals 5]

Reads the Azure LLM inference traces of 2023 (Azure Public Dataset), gives each request to a model
by the popularity of models on OpenRouter, and takes the models' shapes in turn from the catalogue's
Mixture-of-Experts models. Service times come from a decode speed, since the traces have none.

The demand over the trace is replayed exactly. Its P99, the pool's budget, is compared with the sum
of what each model needs by itself (its own P99, its own highest moment, one request of its longest
context), and with the planner's answers without the arrival times. The benchmark also says how
often and for how long demand exceeds the budget, and whether models peak together. Since all
models' requests come from one trace, its bursts reach all models at once, which is the worst case
for a common pool. Models that are shifted apart in time are the other extreme.

Requests are dealt several times, with other popular models and other requests for each: the rows
have the median over the deals, and ``first`` is the first deal, which the plot shows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crosspool.config.deployment import ConfigError
from crosspool.planner.demand.budget import kv_budget, longest_bytes
from crosspool.planner.demand.compound import exact_demand
from crosspool.planner.demand.kv_model import Charge, KVModel, kv_loads
from crosspool.planner.demand.monte_carlo import monte_carlo
from crosspool.planner.demand.peaks import Coincidence, PeakReport, peak_report
from crosspool.planner.demand.replay import ReplayDemand, replay
from crosspool.planner.shapes import catalogue
from crosspool.planner.traffic.popularity import openrouter
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import spread
from crosspool.planner.traffic.trace import Trace
from crosspool.planner.traffic.trace_files import read_trace
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark import machine, plots
from benchmark.records import IMAGES, Recorder
from benchmark.shifted_replays import independent_shifts

QUANTILE = 0.99
PEAK = 0.95
"""A model is at its peak above this quantile of its own demand."""
CHUNK_BYTES = 2 << 20
PAGE_SIZE = 16
WINDOWS = (60.0, 5.0)
"""Lengths in seconds of the windows in which arrivals are taken as Poisson."""
CHARGES: tuple[Charge, ...] = ("active", "promised")
_SUMMARY = __doc__.split("\n", 1)[0]
NAMES = {
    "pool_p99": "budget: P99 of the pool",
    "own_p99": "sum of own P99",
    "own_peak": "sum of own peaks",
    "own_longest": "sum of longest contexts",
    "saving_own_p99": "saving against own P99",
    "saving_own_peak": "saving against own peaks",
    "saving_own_longest": "saving against longest contexts",
    "pool_peak": "peak of the pool",
    "poisson_p99": "P99 if Poisson",
    **{f"windows_{window:g}_p99": f"P99 by windows of {window:g} s" for window in WINDOWS},
    "shifted_p99": "P99, models shifted apart",
    "above": "share of time above the budget",
    "above_times": "times above the budget",
    "above_longest": "longest time above, s",
    "peak_dispersion": "dispersion of models at peak",
    "cut": "requests cut to the context",
}
GB = {name for name in NAMES if name.startswith(("pool", "own", "poisson", "windows", "shifted"))}


@dataclass(frozen=True)
class Setting:
    models: int
    speed: DecodeSpeed
    samples: int
    shifts: int


@dataclass(frozen=True, eq=False)
class Deal:
    """The result of one way to give a trace's requests to models."""

    figures: dict[str, float]
    demand: ReplayDemand
    peaks: PeakReport


def deal(trace: Trace, setting: Setting, charge: Charge, seed: int) -> Deal:
    """Measures the trace's demand when ``seed`` decides the models' ranks of popularity, and which
    model each request is for."""
    names = [name for name in catalogue.names() if catalogue.load(name).experts]
    order = np.random.default_rng(seed).permutation(len(names))
    kv = []
    for rank in range(setting.models):
        shape = catalogue.load(names[order[rank % len(names)]])
        name = f"{shape.id}/{rank // len(names) + 1}"
        kv.append(KVModel(name, shape.kv_bytes_per_token, PAGE_SIZE, shape.context))
    traffic = spread(
        trace, openrouter(len(kv)), [each.name for each in kv], seed, speed=setting.speed
    )
    demand = replay(traffic, kv, charge, chunk_bytes=CHUNK_BYTES)
    budget = kv_budget(demand, kv, QUANTILE, ranks=1)
    peaks = peak_report(demand, PEAK, budget.pool_bytes)
    poisson = exact_demand(traffic, kv, charge, chunk_bytes=CHUNK_BYTES)
    windows = {
        f"windows_{window:g}_p99": monte_carlo(
            traffic, kv, setting.samples, seed, charge,
            chunk_bytes=CHUNK_BYTES, window=window, progress=False,
        ).quantile(QUANTILE).value
        for window in WINDOWS
    }  # fmt: skip
    shifted = independent_shifts(demand, QUANTILE, setting.shifts, seed, progress=False)
    pool = budget.pool_bytes
    alone = {
        "own_p99": float(budget.static_bytes),
        "own_peak": sum(path.max for path in demand.models),
        "own_longest": float(sum(longest_bytes(each, CHUNK_BYTES) for each in kv)),
    }
    figures = {
        "pool_p99": float(pool),
        **alone,
        **{f"saving_{name}": 1 - pool / nbytes for name, nbytes in alone.items()},
        "pool_peak": demand.pool.max,
        "poisson_p99": poisson.quantile(QUANTILE).value,
        **windows,
        "shifted_p99": float(np.median(shifted)),
        "above": peaks.exceedance.fraction,
        "above_times": float(peaks.exceedance.count),
        "above_longest": peaks.exceedance.longest_seconds,
        "peak_dispersion": dispersion(peaks.coincidence),
        "cut": float(sum(load.cut for load in kv_loads(traffic, kv, CHUNK_BYTES))),
    }
    return Deal(figures, demand, peaks)


def dispersion(found: Coincidence) -> float:
    """Returns the variance of the number of models at their peak over that of independent models: 1
    when peaks meet by chance, the number of models when all peak at the same times."""
    expected = sum(share * (1 - share) for share in found.at_peak)
    numbers = np.arange(len(found.together))
    mean = numbers @ np.array(found.together)
    variance = float((numbers - mean) ** 2 @ np.array(found.together))
    return variance / expected if expected else 1.0


def together(first: Trace, second: Trace) -> Trace:
    """Merges both traces from a common start until the first of them ends."""
    assert first.arrival is not None and second.arrival is not None
    arrival = np.concatenate((first.arrival, second.arrival))
    order = np.argsort(arrival, kind="stable")
    order = order[arrival[order] <= min(first.seconds, second.seconds)]
    return Trace(
        np.concatenate((first.prompt, second.prompt))[order],
        np.concatenate((first.output, second.output))[order],
        arrival[order],
    )


def plot(found: Deal, path: Path) -> None:
    """Plots demand over time with the budget, and the number of models at their peak."""
    figure, (demand, peaks) = plots.panels(
        (
            "KV demand of all models, GB (both traces)",
            f"Share of time with k models above their own P{100 * PEAK:g}",
        ),
        columns=1,
    )
    pool = found.demand.pool
    times = np.linspace(0, pool.seconds, 1200, endpoint=False)
    blue, orange, green, *_ = plots.COLORS
    demand.plot(times / 60, pool.at(times) / 1e9, color=blue, linewidth=0.8, label="demand")
    for name, color in (("pool_p99", orange), ("own_p99", green), ("own_peak", "black")):
        nbytes = found.figures[name] / 1e9
        demand.axhline(nbytes, color=color, linewidth=1, label=f"{NAMES[name]}, {nbytes:.1f}")
    demand.set_ylim(0, 1.3 * found.figures["own_peak"] / 1e9)
    demand.set_xlabel("minutes", fontsize=8)
    demand.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    k_models = shares(found.peaks)
    k = np.arange(len(k_models["together"]))
    peaks.bar(k - 0.2, k_models["together"], 0.4, color=blue, label="as in the trace")
    peaks.bar(k + 0.2, k_models["independent"], 0.4, color=orange, label="if independent")
    peaks.set_yscale("log")
    peaks.set_ylim(bottom=1e-6)
    peaks.set_xticks(k)
    peaks.set_xlabel("k", fontsize=8)
    peaks.legend(fontsize=7, frameon=False)
    plots.save(figure, path)


def shares(report: PeakReport) -> dict[str, Any]:
    """Returns shares of the time with 0, 1, 2, ... models at their peak, measured and expected."""
    found = report.coincidence
    count = max(k for k, share in enumerate(found.together) if share > 0) + 1
    return {
        "together": [float(f"{share:.4g}") for share in found.together[:count]],
        "independent": [float(f"{share:.4g}") for share in found.independent[:count]],
    }


def shown(name: str, value: float) -> str:
    if name in GB:
        return f"{value / 1e9:.2f} GB"
    return f"{value:.1%}" if name == "above" or name.startswith("saving") else f"{value:.4g}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.azure_pool", description=_SUMMARY)
    parser.add_argument("conversation", type=Path)
    parser.add_argument("code", type=Path)
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--deals", type=int, default=5)
    parser.add_argument("--tbt-s", type=float, default=0.05, help="time between tokens")
    parser.add_argument("--prefill", type=float, default=8000, help="prompt tokens per second")
    parser.add_argument("--samples", type=int, default=100_000, help="random times of the windows")
    parser.add_argument("--shifts", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one deal, nothing recorded")
    given = parser.parse_args(words)
    speed = DecodeSpeed(tbt_s=given.tbt_s, prefill_tokens_per_s=given.prefill)
    setting = Setting(given.models, speed, given.samples, given.shifts)
    console = Console(width=max(Console().width, 130))
    try:
        conversation, code = read_trace(given.conversation), read_trace(given.code)
    except ConfigError as error:
        console.print(f"error: {error}", style="red")
        return 2
    traces = {
        "conversation": conversation,
        "code": code,
        "both": together(conversation, code),
    }
    recorder = Recorder("azure_pool")
    seeds = range(1 if given.quick else given.deals)
    table = Table("", *[f"{charge} {name}" for charge in CHARGES for name in traces])
    columns = []
    cases = [(charge, name) for charge in CHARGES for name in traces]
    for charge, name in tqdm(cases, desc="azure_pool", disable=None, leave=False):
        load1, cpu, wall = machine.load1(), time.process_time(), time.monotonic()
        deals = [deal(traces[name], setting, charge, seed) for seed in seeds]
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        parameters = {
            "trace": name, "charge": charge, "requests": len(traces[name]),
            "seconds": round(traces[name].seconds, 1), "models": given.models,
            "popularity": "openrouter", "tbt_s": given.tbt_s, "prefill_tokens_per_s": given.prefill,
            "page_size": PAGE_SIZE, "chunk_bytes": CHUNK_BYTES, "quantile": QUANTILE,
            "peak_quantile": PEAK, "samples": given.samples,
            "shifts": given.shifts,
        }  # fmt: skip
        columns.append(deals[0].figures)
        for figure in NAMES:
            values = [each.figures[figure] for each in deals]
            more = shares(deals[0].peaks) if figure == "peak_dispersion" else {}
            recorder.add(
                figure, values, "bytes" if figure in GB else "1", parameters=parameters,
                load1=load1, cpu_s=cpu, wall_s=wall,
                first=values[0], least=min(values), most=max(values), **more,
            )  # fmt: skip
        if (charge, name) == ("active", "both"):
            sample = deals[0]
    for figure, label in NAMES.items():
        table.add_row(label, *[shown(figure, column[figure]) for column in columns])
    console.print(table)
    if not given.quick:
        console.print(f"rows: {recorder.write()}")
        plot(sample, IMAGES / "azure_pool.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
