"""Measures decode steps with KV cache in 8 bits beside bfloat16, at short and long contexts.

    python -m benchmark.kv_types [--rounds 3] [--quick]

Each type has a device process of its own with both pools, on all cores. They take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from crosspool.models.spec import KVCacheDType
from rich.console import Console
from rich.progress import Progress

from benchmark.decoding import one_device
from benchmark.engine import CONTEXT, LONG, QUICK, Bench, Plan
from benchmark.records import Recorder
from benchmark.turns import Comparison, record, table, take_turns

TYPES: tuple[KVCacheDType, ...] = ("fp8_e4m3", "fp8_e5m2")
POINTS = ((1, CONTEXT), (1, LONG), (4, LONG))
"""Requests at once, and the tokens of each."""


def compare(bench: Bench, cores: Sequence[int], progress: Progress) -> list[Comparison]:
    setup = one_device(cores)
    engines = {
        kind: bench.engine(replace(setup, kv_cache_dtype=kind), 1) for kind in ("auto", *TYPES)
    }
    cases = {
        (kind, *point): bench.decode(
            f"KV in {'bfloat16' if kind == 'auto' else kind}, batch {point[0]}, "
            f"context {point[1]:,}",
            engine,
            batch=point[0],
            context=point[1],
        )
        for point in POINTS
        for kind, engine in engines.items()
    }
    take_turns(list(cases.values()), bench.plan.rounds, progress)
    return [
        Comparison(case, None if kind == "auto" else cases["auto", batch, context])
        for (kind, batch, context), case in cases.items()
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.kv_types", description=__doc__)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny model; records nothing"
    )
    given = parser.parse_args(words)
    plan = QUICK if given.quick else Plan(rounds=given.rounds)
    console = Console(width=160)
    recorder = Recorder("kv_types")
    with Progress(console=console, refresh_per_second=2) as progress, ExitStack() as stack:
        bench = Bench(plan, stack)
        comparisons = compare(bench, sorted(os.sched_getaffinity(0)), progress)
    for comparison in comparisons:
        record(recorder, comparison)
    if not given.quick:
        recorder.write()
    console.print(table(f"Decode steps of {bench.model} by type of KV cache", comparisons))
    return 0


if __name__ == "__main__":
    sys.exit(main())
