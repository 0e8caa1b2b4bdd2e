"""Compares the time between tokens at an HTTP client with the engine's own steps in the same run.

    python -m benchmark.http_tbt [--rates 0.2 0.5 1.0] [--layers 4] [--cores 1] [--quick]

Three models behind one server get requests at random times, at the given rates per model. The
models are the checkpoint that engines are compared on, cut to a few layers: with four, a step takes
several milliseconds on one core. Both pools are on one device of ``--cores`` cores, and the other
cores are for the front end and the client. For every gap between two tokens at the client, the
engine's trace says how long the step took that made the second token, and how long after the
model's previous step it ended ("end to end"). Each model has a lane, so that no step waits for one.
"""

from __future__ import annotations

import argparse
import bisect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crosspool.observability.trace import LaneEvent
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark import checkpoint, plots
from benchmark.client import STREAM_FLAGS, Replay, replay
from benchmark.decoding import steps_of
from benchmark.records import IMAGES, Recorder
from benchmark.server import Server
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, poisson, random_prompt

MODELS = 3
PROMPT = 128
OUTPUT = 64
LIMIT = 1.15
"""Highest good ratio of the client's time between tokens to the engine's step, at P50 and P99."""
_VOCAB = 512
"""Size of the smallest vocabulary of the models."""


@dataclass(frozen=True)
class Phase:
    """Measurements at one rate."""

    rate: float
    tbt: list[float]
    """Seconds between tokens at the client."""
    steps: list[float]
    """Seconds in the engine of the step that made each gap's second token."""
    periods: list[float]
    """Seconds from the end of the model's previous step to the end of that step."""
    ttft: list[float]
    complete: int
    usage: Usage

    def ratio(self, q: float) -> float:
        """Return the ratio of the client's gaps to the steps, at quantile ``q``."""
        return quantile(self.tbt, q) / quantile(self.steps, q)

    def ratio_to_period(self, q: float) -> float:
        """Return the ratio of the client's gaps to the engine's, from end to end of steps."""
        return quantile(self.tbt, q) / quantile(self.periods, q)


def make_load(
    names: Sequence[str], rate: float, seconds: float, rng: np.random.Generator
) -> list[Request]:
    requests = [
        Request(float(arrival), name, random_prompt(PROMPT, _VOCAB, rng), OUTPUT)
        for name in names
        for arrival in poisson(rate, seconds, rng)
    ]
    return sorted(requests, key=lambda request: request.arrival)


def measure(server: Server, names: Sequence[str], rate: float, load: list[Request]) -> Phase:
    server.wait_idle()
    server.manage("/crosspool/trace/start")
    with Usage(server) as usage:
        replayed = replay(server.url, load)
    _, answer = server.manage("/crosspool/trace/stop")
    events = [_event(row, names) for row in answer]
    complete = [answer for answer in replayed.answers if answer.complete]
    if len(complete) < len(load):
        raise RuntimeError([answer.error or answer.status for answer in replayed.answers])
    tbt, steps, periods = matched(replayed, names, events)
    ttft = [answer.ttft for answer in complete]
    return Phase(rate, tbt, steps, periods, ttft, len(complete), usage)


def _event(row: dict[str, Any], names: Sequence[str]) -> LaneEvent:
    fields = {key: row[key] for key in LaneEvent.__struct_fields__}
    return LaneEvent(**{**fields, "model": names.index(row["model"])})


def matched(
    replayed: Replay, names: Sequence[str], events: Sequence[LaneEvent]
) -> tuple[list[float], list[float], list[float]]:
    """Return, in seconds, the client's gaps; for each, the duration of the model's last step that
    ended before the gap's second token came; and the time from the end of the step before to its
    end. Gaps from before the trace's first whole step are left out."""
    tbt, spans, periods = list[float](), list[float](), list[float]()
    for model, name in enumerate(names):
        steps = steps_of(events, model)
        ends = [step.end_ns / 1e9 for step in steps]
        for answer in replayed.answers:
            if answer.request.model != name:
                continue
            times = [replayed.started + when for when, _ in answer.pieces]
            for time, gap in zip(times[1:], answer.tbt, strict=True):
                index = bisect.bisect_right(ends, time) - 1
                if index < 1:
                    continue
                tbt.append(gap)
                spans.append(steps[index].span / 1e6)
                periods.append(ends[index] - ends[index - 1])
    return tbt, spans, periods


def table(phases: Sequence[Phase], title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in (
        *(
            "requests/s\na model",
            "TBT P50\nms",
            "step P50\nms",
            "ratio",
            "end to end\nP50 ms",
            "ratio",
        ),
        *("TBT P99\nms", "step P99\nms", "ratio", "end to end\nP99 ms", "ratio"),
        *("TTFT P50\nms", "answers", "others'\nCPU"),
    ):
        made.add_column(column, justify="right")
    for phase in phases:
        cells = [f"{phase.rate:g}"]
        for q in (0.5, 0.99):
            cells.append(f"{1e3 * quantile(phase.tbt, q):.2f}")
            for values, ratio in (
                (phase.steps, phase.ratio(q)),
                (phase.periods, phase.ratio_to_period(q)),
            ):
                color = "green" if ratio <= LIMIT else "red"
                cells += [f"{1e3 * quantile(values, q):.2f}", f"[{color}]{ratio:.2f}[/]"]
        share = total([phase.usage])["other_cpu_share"]
        cells += [f"{1e3 * quantile(phase.ttft, 0.5):.1f}", f"{phase.complete}", f"{share:.0%}"]
        made.add_row(*cells)
    return made


def record(phases: Sequence[Phase], model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("http_tbt")
    for phase in phases:
        both: dict[str, Any] = {
            "model": model,
            "parameters": {"rate": phase.rate, **parameters},
            **total([phase.usage]),
        }
        recorder.add("engine_step", phase.steps, "s", **both)
        recorder.add("engine_period", phase.periods, "s", **both)
        recorder.add("ttft", phase.ttft, "s", **both)
        recorder.add(
            "tbt",
            phase.tbt,
            "s",
            **both,
            ratio_to="engine_step",
            ratio=phase.ratio(0.5),
            ratio_p99=phase.ratio(0.99),
            ratio_to_period=phase.ratio_to_period(0.5),
            ratio_to_period_p99=phase.ratio_to_period(0.99),
            limit=LIMIT,
        )
    return recorder


def plot(phases: Sequence[Phase], path: Path) -> None:
    figure, (axis,) = plots.panels(["Time between tokens over HTTP, and the engine's steps, ms"], 1)
    rates = [phase.rate for phase in phases]
    for q, style in ((0.5, "--o"), (0.99, "-o")):
        for index, what in enumerate(("tbt", "steps")):
            axis.plot(
                rates,
                [1e3 * quantile(getattr(phase, what), q) for phase in phases],
                style,
                color=plots.COLORS[index],
                label=f"{'client' if what == 'tbt' else 'engine'}, P{100 * q:g}",
            )
    axis.set_xlabel("requests/s of each of three models", fontsize=8)
    axis.set_ylim(bottom=0.0)
    axis.legend(fontsize=8)
    plots.save(figure, path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.http_tbt", description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cores", type=int, default=1, help="cores of the device")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each rate's load")
    parser.add_argument(
        "--quick", action="store_true", help="one rate, tiny models; records nothing"
    )
    parser.add_argument("--results", type=Path, help="folder of the records")
    parser.add_argument("--flags", default="", help="further flags of the server, as one word")
    given = parser.parse_args(words)
    rates, seconds = ([1.0], 6.0) if given.quick else (given.rates, given.seconds)
    layers = None if given.quick else given.layers
    folders = checkpoint.models(MODELS, tiny=given.quick, layers=layers)
    names = [folder.name for folder in folders]
    cores = sorted(os.sched_getaffinity(0))[: given.cores]
    device = "cpu:" + "+".join(map(str, cores))
    flags = [
        *("--kv-pool-devices", device, "--weight-pool-devices", device, "--loop", "resident"),
        *("--lanes", str(MODELS), "--kv-pool-bytes", str(256 << 20), *STREAM_FLAGS),
        *given.flags.split(),
    ]
    console = Console(width=170)
    phases = []
    with (
        Progress(console=console, refresh_per_second=2) as progress,
        Server(flags, [str(folder) for folder in folders]) as server,
    ):
        task = progress.add_task("first requests", total=len(rates))
        rng = np.random.default_rng(0)
        measure(server, names, 1.0, make_load(names, 1.0, 4.0, rng))
        for rate in rates:
            progress.update(task, description=f"{rate:g} requests/s of each model")
            load = make_load(names, rate, seconds, rng)
            phases.append(measure(server, names, rate, load))
            progress.advance(task)
    model = names[0].rpartition("-")[0]
    if not given.quick:
        parameters = {
            "cores": given.cores,
            "lanes": MODELS,
            "prompt": PROMPT,
            "output": OUTPUT,
            "models": MODELS,
        }
        recorder = record(phases, model, parameters)
        recorder.write(given.results) if given.results else recorder.write()
        plot(phases, (given.results or IMAGES) / "http_tbt.svg")
    console.print(table(phases, f"{MODELS} x {model}, a device of {given.cores} core(s)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
