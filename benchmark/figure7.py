"""Compares CrossPool with static partition and monolithic serving as the paper's Figure 7 does.
It measures the time between tokens against the request rate, with Poisson arrivals.

    python -m benchmark.figure7 [--lengths FILE.csv] [--quick]

Two models, the checkpoint that engines are compared on cut to four layers, are served on two
devices of one core each and of equal memory, in the placements of docs/baselines.md. KV memory is
what weights leave. All placements get the same requests at the same times; a round serves one after
another, in an order that turns from round to round. Front end and client share the devices' cores,
under every placement alike.

First every placement answers requests that always wait. The lowest requests/s among them is the
saturation, and the rates are shares of it. The lengths are those of a CSV file with the columns
prompt_tokens and output_tokens, such as ShareGPT's, or of a law that the planner has by name. They
are divided by ``--shrink``, as the models are that much faster to be saturated with long ones.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from crosspool.planner.traffic.lengths import PUBLISHED
from rich.console import Console
from rich.progress import Progress

from benchmark import checkpoint
from benchmark.baselines import (
    WAYS,
    Way,
    deployment,
    device_bytes,
    kv_bytes,
    names_of,
    weights_of,
)
from benchmark.client import replay
from benchmark.figure7_report import Phase, plot, record, rows_of, table, verdicts
from benchmark.records import IMAGES
from benchmark.server import Server
from benchmark.usage import Usage
from benchmark.workload import Request, random_prompt

MODELS = 2
LAYERS = 4
SHARES = (0.2, 0.5, 0.8, 1.0)
"""Rates as shares of the saturation; the paper's are 0.2 to 1.0 requests/s of each model."""
AT_ONCE = 8
"""Open requests of each model while the saturation is measured."""
CONTEXT = 2048
_VOCAB = 512
"""Size of the smallest vocabulary of the models."""


@dataclass(frozen=True)
class Plan:
    """Amount of what is measured."""

    folders: tuple[Path, ...]
    devices: tuple[str, ...]
    lengths: tuple[tuple[int, int], ...]
    """Prompt and output tokens of requests, in pairs."""
    shares: tuple[float, ...] = SHARES
    rounds: int = 3
    seconds: float = 20.0
    """Length of one rate in one round."""
    saturating: int = 16
    """Requests of each model that measure the saturation."""
    ways: tuple[Way, ...] = WAYS

    def request(self, arrival: float, model: str, rng: np.random.Generator) -> Request:
        prompt, output = self.lengths[int(rng.integers(len(self.lengths)))]
        return Request(arrival, model, random_prompt(prompt, _VOCAB, rng), output)

    def load(self, rate: float, seed: Sequence[int]) -> list[Request]:
        """Draw arrivals of a Poisson process for each model, given that exactly as many come as
        ``rate`` per second says, and at least one. Short loads then are what their name says."""
        rng = np.random.default_rng(seed)
        count = max(1, round(rate * self.seconds))
        requests = [
            self.request(float(arrival), folder.name, rng)
            for folder in self.folders
            for arrival in rng.uniform(0.0, self.seconds, count)
        ]
        return sorted(requests, key=lambda request: request.arrival)

    def backlog(self, count: int, seed: int) -> list[Request]:
        rng = np.random.default_rng(seed)
        return [self.request(0.0, self.folders[i % MODELS].name, rng) for i in range(count)]


def read_lengths(given: str, shrink: int, count: int = 300) -> tuple[tuple[int, int], ...]:
    """Return pairs of prompt and output tokens, divided by ``shrink``: those of a CSV file, or
    ``count`` drawn from a law of the planner. Raises OSError, KeyError, ValueError."""
    if given in PUBLISHED:
        drawn = PUBLISHED[given].draw(count, np.random.default_rng(0))
        pairs = [(int(p), int(o)) for p, o in zip(*drawn, strict=True)]
    else:
        with Path(given).open(newline="") as file:
            rows = csv.DictReader(file)
            pairs = [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in rows]
    if not pairs:
        raise ValueError(f"{given} has no lengths")
    return tuple(_within(max(1, p // shrink), max(2, o // shrink)) for p, o in pairs)


def _within(prompt: int, output: int) -> tuple[int, int]:
    """Cut a request to the models' context."""
    output = min(output, CONTEXT // 2)
    return min(prompt, CONTEXT - output), output


def served_by(way: Way, plan: Plan, load: Sequence[Request]) -> list[Request]:
    """Return the requests under the names of a placement: in turn, where a model has several."""
    names = {
        model: cycle(own) for model, own in names_of(way, plan.folders, len(plan.devices)).items()
    }
    return [replace(request, model=next(names[request.model])) for request in load]


def start(way: Way, plan: Plan, folder: Path, stack: ExitStack) -> Server:
    """Start the server of a placement, and make every buffer that is made at first use."""
    weights = [weights_of(path, len(plan.devices)) for path in plan.folders]
    kv = kv_bytes(way, weights, len(plan.devices))
    options = deployment(way, plan.folders, plan.devices, kv)
    for model in options["models"]:
        model["context_length"] = CONTEXT
    options["sglang"] = {"incremental_streaming_output": True}
    options["packed_cache_dir"] = str(folder / "packed")
    file = folder / f"{way}.yaml"
    file.write_text(yaml.safe_dump(options))
    server = stack.enter_context(Server(["--config", str(file)], models=()))
    measure(server, way, plan, plan.backlog(2 * AT_ONCE, 1), share=0.0, turn=0)
    return server


def measure(
    server: Server, way: Way, plan: Plan, load: list[Request], *, share: float, turn: int
) -> Phase:
    server.wait_idle()
    with Usage(server) as usage:
        replayed = replay(server.url, served_by(way, plan, load))
    failed = [a.error or str(a.status) for a in replayed.answers if not a.complete]
    if failed:
        raise RuntimeError(f"{way}: {len(failed)} requests failed: {failed[:3]}")
    return Phase(way, share, turn, replayed, usage)


def saturation(server: Server, way: Way, plan: Plan) -> float:
    """Return the requests/s of each model that are answered while requests always wait."""
    backlog = served_by(way, plan, plan.backlog(plan.saturating * MODELS, 2))
    answers = replay(server.url, backlog, at_once=AT_ONCE * MODELS).answers
    begin, end = min(a.done for a in answers), max(a.sent for a in answers)
    done = sum(begin < a.done <= end for a in answers)
    return done / (end - begin) / MODELS


def run(plan: Plan, folder: Path, console: Console) -> tuple[list[Phase], dict[Way, float]]:
    """Return every phase, and the saturation of each placement in requests/s of each model."""
    found: dict[Way, float] = {}
    phases: list[Phase] = []
    turns = len(plan.ways) * (1 + plan.rounds * len(plan.shares))
    with Progress(console=console, refresh_per_second=2) as progress:
        task = progress.add_task("saturation", total=turns)
        for way in plan.ways:
            with ExitStack() as stack:
                found[way] = saturation(start(way, plan, folder, stack), way, plan)
            progress.advance(task)
        least = min(found.values())
        for turn in range(plan.rounds):
            first = turn % len(plan.ways)
            for way in (*plan.ways[first:], *plan.ways[:first]):
                with ExitStack() as stack:
                    server = start(way, plan, folder, stack)
                    for share in plan.shares:
                        progress.update(task, description=f"round {turn + 1}, {way}, {share:g}")
                        load = plan.load(share * least, (turn, round(100 * share)))
                        phases.append(measure(server, way, plan, load, share=share, turn=turn))
                        progress.advance(task)
    return phases, found


def parameters(plan: Plan, given: argparse.Namespace, found: dict[Way, float]) -> dict[str, Any]:
    """Return what every record has."""
    weights = [weights_of(path, len(plan.devices)) for path in plan.folders]
    prompts, outputs = zip(*plan.lengths, strict=True)
    return {
        "models": MODELS,
        "layers": LAYERS,
        "devices": plan.devices,
        "device_bytes": device_bytes(weights),
        "kv_pool_bytes": {way: kv_bytes(way, weights, len(plan.devices)) for way in plan.ways},
        "lengths": Path(given.lengths).name,
        "shrink": given.shrink,
        "mean_prompt": float(np.mean(prompts)),
        "mean_output": float(np.mean(outputs)),
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "saturation": {way: round(rate, 4) for way, rate in found.items()},
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.figure7", description=__doc__)
    parser.add_argument(
        "--lengths",
        default="azure-conversation",
        help=f"CSV file, or one of {', '.join(PUBLISHED)} (default: %(default)s)",
    )
    parser.add_argument("--shrink", type=int, default=4, help="divisor of all lengths")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each rate's load")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=SHARES,
        help="rates, as shares of the saturation (default: 0.2 0.5 0.8 1)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one short round of tiny models; records nothing"
    )
    given = parser.parse_args(words)
    console = Console(width=max(Console().width, 130))
    cores = sorted(os.sched_getaffinity(0))[:MODELS]
    if len(cores) < MODELS:
        console.print("figure7 needs two cores for two devices")
        return 2
    try:
        lengths = read_lengths(given.lengths, given.shrink)
    except (OSError, KeyError, ValueError) as error:
        console.print(
            f"--lengths {given.lengths}: {error!r}: give a CSV file with prompt_tokens "
            "and output_tokens",
            markup=False,
        )
        return 2
    plan = Plan(
        tuple(checkpoint.models(MODELS, tiny=given.quick, layers=None if given.quick else LAYERS)),
        tuple(f"cpu:{core}" for core in cores),
        lengths,
        shares=tuple(given.shares),
        rounds=given.rounds,
        seconds=given.seconds,
    )
    if given.quick:
        plan = replace(plan, shares=(0.5,), rounds=1, seconds=4.0, saturating=4)
    with tempfile.TemporaryDirectory(prefix="crosspool-figure7-") as folder:
        phases, found = run(plan, Path(folder), console)
    rows = rows_of(phases)
    if not given.quick:
        recorder = record(rows, parameters(plan, given, found))
        console.print(f"rows: {recorder.write()}")
        plot(rows, IMAGES / "figure7.svg")
    console.print(table(rows, found))
    for line in verdicts(rows):
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
