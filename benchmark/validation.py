"""Compares the simulator with served runs: ``crosspool simulate``'s core and costs on the same
requests as a real server had.

    python -m benchmark.validation [--again] [--quick]

Costs are measured first (``benchmark.calibrate``), for both pools on one core and for a core each.
Then a server takes 24 short open-loop runs: different rates and lengths, both placements, a KV pool
that is too small for the load, and a weight pool that holds one of two models. Half of the runs fit
the few times that the engine alone does not show (of the host, and how much serving slows devices);
the others are never used for it. For each run there are a simulated and a measured mean E2E, mean
TTFT and P99 of the time between tokens.

The measured requests are kept beside the checkpoints; ``--again`` simulates them anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from crosspool.config.deployment import Deployment
from crosspool.config.runtime_dir import find_running
from crosspool.models.registry import read_model, specs_of
from crosspool.simulator.costs import CostTable, write_costs
from crosspool.simulator.events import simulate
from crosspool.simulator.requests import SimulatedRequest
from crosspool.weightpool.placement import FFNShard, ffn_bytes
from rich.console import Console
from rich.table import Table

from benchmark import calibrate, checkpoint, machine
from benchmark.client import STREAM_FLAGS, replay
from benchmark.fit import fitted
from benchmark.records import RESULTS, Recorder
from benchmark.server import Server
from benchmark.workload import Request, poisson, random_prompt

TARGETS = {"e2e": 0.05, "ttft": 0.10, "tbt_p99": 0.15}
"""Largest good difference of a figure, over the measured one."""
LAYERS = 4
SECONDS = 9.0
"""Length of a run's arrivals."""
MODELS = 2
_KV_BYTES = 512 << 20
_WAKE_SHARE = 1.2
"""The weight pool of runs with wakes, in models."""


@dataclass(frozen=True)
class Run:
    """One load on one server."""

    server: str
    """The name of the server's kind."""
    rate: float
    prompt: tuple[int, int]
    output: tuple[int, int]
    seed: int
    fits: bool
    """Whether the run is used to fit the host's times."""

    @property
    def name(self) -> str:
        return f"{self.server}, {self.rate:g}/s, {self.prompt[1]} to {self.output[1]}"

    def load(self, names: Sequence[str], vocab: int, seconds: float) -> list[Request]:
        rng = np.random.default_rng(self.seed)
        made = []
        for arrival in poisson(self.rate, seconds, rng):
            prompt = random_prompt(int(rng.integers(*self.prompt)), vocab, rng)
            name = names[int(rng.integers(len(names)))]
            made.append(Request(float(arrival), name, prompt, int(rng.integers(*self.output))))
        return made or [Request(0.0, names[0], random_prompt(32, vocab, rng), 16)]


def _runs() -> list[Run]:
    kinds: dict[str, list[tuple[float, int, int]]] = {
        "one core": [
            (0.5, 64, 48), (0.5, 256, 32), (1.0, 64, 48), (1.0, 128, 48),
            (1.5, 64, 32), (1.5, 128, 24), (2.0, 64, 24), (0.7, 512, 32),
        ],
        "two cores": [
            (0.5, 64, 48), (1.0, 128, 32), (1.5, 64, 48), (1.0, 64, 48), (2.0, 128, 24),
            (0.7, 512, 32),
        ],
        "small KV pool": [(1.5, 128, 48), (2.0, 96, 48), (2.5, 64, 48), (1.5, 192, 32)],
        "wakes": [
            (0.4, 64, 32), (0.6, 64, 32), (0.8, 128, 24), (1.0, 64, 24), (0.5, 256, 32),
            (1.2, 64, 16),
        ],
    }  # fmt: skip
    return [
        Run(kind, rate, (prompt // 2, prompt + 1), (output // 2, output + 1), seed, not place % 2)
        for kind, loads in kinds.items()
        for place, (rate, prompt, output) in enumerate(loads)
        for seed in [100 * len(kind) + place]
    ]


RUNS = _runs()


class MeasuredRequest(msgspec.Struct, frozen=True):
    """One request as the client saw it. Times are in seconds from when it was sent."""

    sent: float
    model: str
    prompt: int
    output: int
    ttft: float
    e2e: float
    gaps: list[float]


class MeasuredRun(msgspec.Struct, frozen=True):
    run: dict[str, Any]
    deployment: Deployment
    requests: list[MeasuredRequest]
    load1: float


class Raw(msgspec.Struct, frozen=True):
    """What is kept between measuring and simulating."""

    tables: dict[str, CostTable]
    """Costs by placement, as the engine alone has them."""
    runs: list[MeasuredRun]


@dataclass(frozen=True)
class Figures:
    """Figures of one run, in seconds."""

    e2e: float
    ttft: float
    tbt_p99: float
    tbt: float


def placement(run: Run) -> str:
    return "two" if run.server == "two cores" else "one"


def flags(server: str, cache: str, own: int) -> list[str]:
    """Return the flags of a kind of server; ``own`` has the bytes of one model's FFN weights."""
    found = [*STREAM_FLAGS, "--disable-radix-cache", "--packed-cache-dir", cache]
    found += ["--packed-cache-bytes", str(16 << 30), "--context-length", "1024"]
    found += ["--kv-pool-devices", "cpu:0", "--weight-pool-devices"]
    found += ["cpu:1" if server == "two cores" else "cpu:0"]
    found += ["--kv-pool-bytes", str(6 << 20 if server == "small KV pool" else _KV_BYTES)]
    if server == "wakes":
        found += ["--weight-pool-bytes", str(int(_WAKE_SHARE * own))]
        found += ["--residency-quantum", "1"]
    return found


def measure(seconds: float, folders: Sequence[Path], runs: Sequence[Run]) -> Iterator[MeasuredRun]:
    """Serve every run; servers start once for each kind."""
    spec = read_model(folders[0])
    vocab, own = spec.vocab, ffn_bytes(spec, FFNShard(rank=0, ranks=1, parallel="tp"))
    names = [folder.name for folder in folders]
    with tempfile.TemporaryDirectory(prefix="crosspool-validation-") as cache:
        for kind in dict.fromkeys(run.server for run in runs):
            with Server(
                flags(kind, cache, own), models=[str(folder) for folder in folders]
            ) as server:
                deployment = find_running(server.port)
                rng = np.random.default_rng(1)
                for name in names:  # the first request of a model takes longer
                    warm = Request(0.0, name, random_prompt(64, vocab, rng), 8)
                    replay(server.url, [warm])
                for run in (run for run in runs if run.server == kind):
                    server.wait_idle()
                    load1 = machine.load1()
                    answers = replay(server.url, run.load(names, vocab, seconds)).answers
                    if bad := [a.error or a.status for a in answers if not a.complete]:
                        raise RuntimeError(f"{run.name}: {bad[0]}")
                    yield MeasuredRun(
                        asdict(run),
                        deployment,
                        [
                            MeasuredRequest(
                                a.sent, a.request.model, a.prompt_tokens, len(a.tokens),
                                a.pieces[0][0] - a.sent, a.done - a.sent, a.tbt,
                            )
                            for a in answers
                        ],
                        load1,
                    )  # fmt: skip


def measured_figures(run: MeasuredRun) -> Figures:
    gaps = [gap for request in run.requests for gap in request.gaps]
    return Figures(
        e2e=float(np.mean([request.e2e for request in run.requests])),
        ttft=float(np.mean([request.ttft for request in run.requests])),
        tbt_p99=float(np.percentile(gaps, 99)),
        tbt=float(np.mean(gaps)),
    )


def simulated_figures(run: MeasuredRun, table: CostTable) -> Figures:
    """Simulate the requests of a measured run."""
    d = run.deployment
    numbers = {name: number for number, name in d.names.items()}
    requests = [
        SimulatedRequest(r.sent, numbers[r.model], r.prompt, r.output) for r in run.requests
    ]
    found = simulate(d, specs_of(d.models), table, requests)
    if any(outcome.status != 200 for outcome in found.outcomes):
        raise RuntimeError("a simulated request was refused, which the server served")
    pairs = list(zip(requests, found.outcomes, strict=True))
    gaps = np.concatenate([np.repeat(each.seconds, each.times) for each in found.gaps.values()])
    return Figures(
        e2e=float(np.mean([o.end - r.arrival for r, o in pairs])),
        ttft=float(np.mean([o.first - r.arrival for r, o in pairs])),
        tbt_p99=float(np.percentile(gaps, 99)),
        tbt=float(np.mean(gaps)),
    )


def compare(raw: Raw) -> tuple[Recorder, Table, dict[str, CostTable]]:
    """Fit the host's times, simulate every run, and make the rows and the table."""
    tables = dict(raw.tables)
    for name, alone in raw.tables.items():
        own = [m for m in raw.runs if m.run["fits"] and placement(_run(m)) == name]
        if own:
            pairs = [(m, measured_figures(m)) for m in own]
            tables[name] = fitted(
                alone,
                [(measured, lambda t, m=m: simulated_figures(m, t)) for m, measured in pairs],  # type: ignore[misc]
            )
    recorder = Recorder("validation")
    made = Table(title="Simulated against measured, in ms", title_justify="left")
    for heading in ("run", "fits", "requests", *(n for f in TARGETS for n in (f, "measured", "%"))):
        made.add_column(heading, justify="left" if heading == "run" else "right")
    good = {(what, fits): [0, 0] for what in TARGETS for fits in (True, False)}
    for m in raw.runs:
        run = _run(m)
        real, simulated = measured_figures(m), simulated_figures(m, tables[placement(run)])
        cells: list[str] = [run.name, "yes" if run.fits else "", str(len(m.requests))]
        for what, limit in TARGETS.items():
            mine, theirs = getattr(simulated, what), getattr(real, what)
            error = mine / theirs - 1
            good[what, run.fits][0] += abs(error) <= limit
            good[what, run.fits][1] += 1
            color = "green" if abs(error) <= limit else "red"
            cells += [f"{1e3 * mine:.1f}", f"{1e3 * theirs:.1f}", f"[{color}]{100 * error:+.1f}[/]"]
            recorder.add(
                what, [theirs], "s", parameters=m.run, cpu_s=0.0, wall_s=SECONDS, load1=m.load1,
                requests=len(m.requests), simulated=mine, error=error,
            )  # fmt: skip
        made.add_row(*cells)
    told = ", ".join(
        f"{what} {of[0]} of {of[1]} {'that fit' if fits else 'held out'}"
        for (what, fits), of in good.items()
    )
    made.caption = f"within their targets: {told}"
    return recorder, made, tables


def _run(m: MeasuredRun) -> Run:
    return msgspec.convert(m.run, Run)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.validation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--again", action="store_true", help="simulate the kept runs anew")
    parser.add_argument("--quick", action="store_true", help="tiny checkpoints, record nothing")
    given = parser.parse_args(words)
    kept = checkpoint.cache_dir() / "validation.json"
    if given.again:
        raw = msgspec.json.decode(kept.read_bytes(), type=Raw)
    else:
        folders = checkpoint.models(
            MODELS, tiny=given.quick, layers=None if given.quick else LAYERS
        )
        places = ("one",) if given.quick else ("one", "two")
        tables = {
            name: calibrate.measure(folders, name, f"python -m benchmark.validation ({name})")
            for name in places
        }
        runs = [r for r in RUNS if r.server == "one core"][:2] if given.quick else RUNS
        raw = Raw(tables, list(measure(3.0 if given.quick else SECONDS, folders, runs)))
        if not given.quick:
            kept.write_bytes(msgspec.json.encode(raw))
    recorder, table, tables = compare(raw)
    Console(width=int(os.environ.get("COLUMNS", "150"))).print(table)
    if not given.quick:
        print(f"rows: {recorder.write()}")
        for name, of in tables.items():
            write_costs(of, RESULTS / f"costs_{name}_core{'s' if name == 'two' else ''}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
