"""Measures how long the planner takes for demand at a random time, with many models and samples.

    python -m benchmark.planner_speed [--models 300] [--samples 1000000]

Models share a rate by the popularity of models on OpenRouter; lengths are log-normal as in the
Azure conversation trace. At each rate, the Monte Carlo and the same law by FFT are timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from crosspool.planner.demand.compound import ExactDemand, exact_demand
from crosspool.planner.demand.kv_model import KVModel, kv_loads
from crosspool.planner.demand.monte_carlo import DemandSamples, monte_carlo
from crosspool.planner.traffic.lengths import PUBLISHED
from crosspool.planner.traffic.popularity import openrouter
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import by_lengths
from rich.console import Console
from rich.table import Table

from benchmark import machine
from benchmark.records import Recorder

RATES = (10.0, 100.0, 1000.0)
"""Requests per second of all models together."""
CHUNK_BYTES = 2 << 20
ROWS = 10_000
"""Number of samples per model from which requests are drawn."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.planner_speed", description=__doc__)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--samples", type=int, default=1_000_000)
    given = parser.parse_args(words)
    names = [f"model{i}" for i in range(given.models)]
    kv = [KVModel(name, 98304, 16, 131072) for name in names]
    recorder = Recorder("planner_speed")
    table = Table("requests/s", "active", "by", "wall s", "cpu s", "P99 GB", "interval GB")
    for rate in RATES:
        traffic = by_lengths(
            PUBLISHED["azure-conversation"], rate * openrouter(given.models), names, ROWS, 0,
            speed=DecodeSpeed(tbt_s=0.05, prefill_tokens_per_s=8000),
        )  # fmt: skip
        active = sum(load.active for load in kv_loads(traffic, kv, CHUNK_BYTES))
        for way in ("monte_carlo", "exact"):
            load1, cpu, wall = machine.load1(), time.process_time(), time.monotonic()
            demand: DemandSamples | ExactDemand
            if way == "monte_carlo":
                demand = monte_carlo(traffic, kv, given.samples, 0, chunk_bytes=CHUNK_BYTES)
            else:
                demand = exact_demand(traffic, kv, chunk_bytes=CHUNK_BYTES)
            p99 = demand.quantile(0.99)
            cpu, wall = time.process_time() - cpu, time.monotonic() - wall
            parameters = {
                "models": given.models, "rate": rate, "active": round(active, 1), "rows": ROWS,
                "samples": given.samples if way == "monte_carlo" else None,
            }  # fmt: skip
            recorder.add(
                way, [wall], "s", parameters=parameters, cpu_s=cpu, wall_s=wall, load1=load1,
                p99_bytes=p99.value, p99_low=p99.low, p99_high=p99.high,
            )  # fmt: skip
            table.add_row(
                f"{rate:g}", f"{active:.0f}", way, f"{wall:.1f}", f"{cpu:.1f}",
                f"{p99.value / 1e9:.2f}", f"{p99.low / 1e9:.2f} to {p99.high / 1e9:.2f}",
            )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"rows: {recorder.write()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
