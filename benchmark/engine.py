"""Measures our engine alone, on the checkpoint that engines are compared on: how far its steps are
from the bound that memory sets, what models cost each other, and what two devices cost.

    python -m benchmark.engine [--quick]

There are three placements: both pools on one device of two cores; both on a device of one core,
alone and beside another engine on the other core (a static partition); and a core for each pool.
Cases take turns. The benchmark needs 14 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from crosspool.models.registry import read_model
from rich.console import Console
from rich.progress import Progress

from benchmark import checkpoint, floors
from benchmark.decoding import Decoded, Engine, Parts, Setup, one_device, two_devices
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.turns import Case, Comparison, Measured, record, table, take_turns

CONTEXT = 256
LONG = 4096
PROMPT = 2048


@dataclass(frozen=True)
class Plan:
    """Amount of what is measured."""

    rounds: int = 3
    steps: int = 150
    """Decode steps of batch 1 in one turn."""
    batched_steps: int = 40
    tiny: bool = False


QUICK = Plan(rounds=1, steps=20, batched_steps=10, tiny=True)


class Bench:
    """Makes cases for one shape of checkpoint."""

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        self.plan = plan
        self._stack = stack
        self.checkpoints = checkpoint.models(2, tiny=plan.tiny)
        self.spec = read_model(self.checkpoints[0])
        self.model = self.checkpoints[0].name.rpartition("-")[0]
        self.traced: dict[str, list[Decoded]] = {}
        """Traced decodes by the case's name."""

    def engine(self, setup: Setup, models: int) -> Engine:
        return self._stack.enter_context(Engine(self.checkpoints[:models], setup))

    def decode(
        self,
        name: str,
        engine: Engine,
        *,
        models: int = 1,
        batch: int = 1,
        context: int = CONTEXT,
        trace: bool = False,
    ) -> Case:
        plan = self.plan
        steps = plan.steps if batch == 1 else plan.batched_steps

        def take() -> Measured:
            decoded = engine.decode(batch, context, steps, models, trace)
            if trace:
                self.traced.setdefault(name, []).append(decoded)
            return Measured(decoded.all_ms, decoded.cpu_s, decoded.wall_s)

        return self._case(
            name, take, engine.setup.cores, batch=batch, context=context, models=models
        )

    def partition(self, name: str, engines: Sequence[Engine]) -> Case:
        """Make a case of one engine per core, each with one model."""

        def take() -> Measured:
            with ThreadPoolExecutor(len(engines)) as pool:
                both = list(pool.map(lambda e: e.decode(1, CONTEXT, self.plan.steps, 1), engines))
            return Measured(
                [ms for decoded in both for ms in decoded.all_ms],
                sum(decoded.cpu_s for decoded in both),
                max(decoded.wall_s for decoded in both),
            )

        cores = [core for engine in engines for core in engine.setup.cores]
        return self._case(name, take, cores, models=len(engines))

    def prefill(self, name: str, engine: Engine, tokens: int = PROMPT) -> Case:
        def take() -> Measured:
            start, cpu = time.perf_counter(), engine.cpu_seconds()
            ms = [1e3 * engine.prefill(tokens)]
            return Measured(ms, engine.cpu_seconds() - cpu, time.perf_counter() - start)

        return self._case(name, take, engine.setup.cores, batch=0, context=tokens)

    def floor(self, name: str, cores: Sequence[int], batch: int = 1) -> Case:
        """Make a case of reading the bytes that a step must read."""

        def take() -> Measured:
            start = time.perf_counter()
            ms = [1e3 * s for s in floors.step_seconds(cores, self.spec, batch, CONTEXT)]
            wall = time.perf_counter() - start
            return Measured(ms, wall * len(cores), wall)

        return self._case(name, take, cores, batch=batch)

    def _case(
        self,
        name: str,
        take: Callable[[], Measured],
        cores: Sequence[int],
        *,
        batch: int = 1,
        context: int = CONTEXT,
        models: int = 1,
    ) -> Case:
        return Case(name, take, self.model, batch, context, len(cores), models)


def on_one_device(bench: Bench, cores: Sequence[int], progress: Progress) -> list[Comparison]:
    both = bench.engine(one_device(cores), 2)
    alone = [bench.engine(one_device([core]), 1) for core in cores]
    floor = bench.floor("floor, two cores", cores)
    floor_one = bench.floor("floor, one core", cores[1:])
    floor_batch = bench.floor("floor, two cores, batch 8", cores, 8)
    one = bench.decode("one model, two cores", both)
    single = bench.decode("one model, one core", alone[1])
    partition = bench.partition("a model on each core, static", alone)
    two = bench.decode("two models, two cores", both, models=2)
    one_batch = bench.decode("one model, batch 8", both, batch=8)
    two_batch = bench.decode("two models, batch 8", both, models=2, batch=8)
    long = bench.decode("one model, context 4096", both, context=LONG)
    prefill = bench.prefill("prompt of 2048", both)
    traced = bench.decode("one model, two cores, traced", both, trace=True)
    cases = [
        *(floor, floor_one, floor_batch, one, single, partition, two),
        *(one_batch, two_batch, long, prefill, traced),
    ]
    take_turns(cases, bench.plan.rounds, progress)
    return [
        Comparison(floor),
        Comparison(one, floor, 1.2),
        Comparison(traced, one),
        Comparison(long, one),
        Comparison(floor_one),
        Comparison(single, floor_one),
        Comparison(partition, single),
        Comparison(two, single, 1.1),
        Comparison(floor_batch),
        Comparison(one_batch, floor_batch),
        Comparison(two_batch, one_batch),
        Comparison(prefill),
    ]


def on_two_devices(bench: Bench, cores: Sequence[int], progress: Progress) -> list[Comparison]:
    one_lane = bench.engine(two_devices(cores[0], cores[1], lanes=1), 2)
    two_lanes = bench.engine(two_devices(cores[0], cores[1], lanes=2), 2)
    one = bench.decode("two devices: one model", two_lanes)
    first = bench.decode("two devices: two models, one lane", one_lane, models=2)
    second = bench.decode("two devices: two models, two lanes", two_lanes, models=2)
    batch_first = bench.decode("two devices: batch 8, one lane", one_lane, models=2, batch=8)
    batch_second = bench.decode("two devices: batch 8, two lanes", two_lanes, models=2, batch=8)
    traced = bench.decode("two devices: one model, traced", two_lanes, trace=True)
    take_turns([one, first, second, batch_first, batch_second, traced], bench.plan.rounds, progress)
    return [
        Comparison(one),
        Comparison(first),
        Comparison(second, first),
        Comparison(batch_first),
        Comparison(batch_second, batch_first),
        Comparison(traced, one),
    ]


def parts(decoded: Sequence[Decoded]) -> dict[str, float]:
    """Return medians in microseconds of a step's parts and of the hand-overs within it, from the
    trace. ``between_us`` is the time from a step's last part to the next step's first."""
    steps: list[Parts] = [step for one in decoded for step in one.parts[0]]

    def middle(values: list[float]) -> float:
        return quantile(values, 0.5)

    between = [
        (then.end_ns - first.end_ns) / 1e3 - then.span
        for one in decoded
        for first, then in pairwise(one.parts[0])
    ]
    return {
        "attention_us": middle([step.attention for step in steps]),
        "ffn_us": middle([step.ffn for step in steps]),
        "lm_head_us": middle([step.lm_head for step in steps]),
        "span_us": middle([step.span for step in steps]),
        "between_us": middle(between),
        "dispatch_us": middle([us for one in decoded for us in one.dispatch_us]),
        "dispatch_p99_us": quantile([us for one in decoded for us in one.dispatch_us], 0.99),
        "combine_us": middle([us for one in decoded for us in one.combine_us]),
        "combine_p99_us": quantile([us for one in decoded for us in one.combine_us], 0.99),
    }


def shown(name: str, measured: dict[str, float], layers: int) -> str:
    share = (measured["dispatch_us"] + measured["combine_us"]) * layers / measured["span_us"]
    return (
        f"{name}: attention {measured['attention_us']:.0f} us, FFN {measured['ffn_us']:.0f}, "
        f"LM head {measured['lm_head_us']:.0f}, between steps {measured['between_us']:.0f}; "
        f"dispatch {measured['dispatch_us']:.2f} us (P99 {measured['dispatch_p99_us']:.2f}), "
        f"combine {measured['combine_us']:.2f} ({measured['combine_p99_us']:.2f}), "
        f"{share:.1%} of a step"
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.engine", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny model; records nothing"
    )
    parser.add_argument("--results", type=Path, help="folder of the records")
    given = parser.parse_args(words)
    plan = QUICK if given.quick else Plan()
    cores = sorted(os.sched_getaffinity(0))[-2:]
    if len(cores) < 2:
        parser.error("two cores are needed")
    console = Console(width=190)
    recorder = Recorder("engine")
    comparisons, traces = [], []
    with Progress(console=console, refresh_per_second=2) as progress:
        for measure in (on_one_device, on_two_devices):
            with ExitStack() as stack:
                bench = Bench(plan, stack)
                done = measure(bench, cores, progress)
            for comparison in done:
                name = comparison.case.name
                more = parts(bench.traced[name][1:]) if name in bench.traced else {}
                if more:
                    traces.append(shown(name, more, bench.spec.layers))
                if not comparison.case.batch:
                    rates = [1e3 * PROMPT / ms for ms in comparison.case.ms]
                    more["tokens_per_s"] = float(np.median(rates))
                    traces.append(f"{name}: {more['tokens_per_s']:.0f} tokens/s")
                record(recorder, comparison, **more)
            comparisons += done
    if not given.quick:
        recorder.write(given.results) if given.results else recorder.write()
    console.print(table(f"Decode steps of {bench.model}", comparisons))
    for line in traces:
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
