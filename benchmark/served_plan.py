"""Compares a served run with its own plan.

    python -m benchmark.served_plan [--quick]

1. A generated load (Poisson arrivals, lognormal lengths, three models of unlike popularity) is
   served for a short time, to learn the decode speed at this load.
2. From rates, lengths and that speed, the planner predicts what the KV pool will hold: the P99 at a
   random time, and the interval in which the P99 of one run of this length falls.
3. A load from another seed is served, and the pool's use is sampled.

Measured and planned are compared twice: the bytes that are mapped, with the tokens that requests
have (the charge ``active``), and the bytes that are promised, with what they may come to have
(``promised``). Two replays of the served trace tell apart what the plan misses: one with the plan's
service times, which leaves out the chance of arrivals, and one with the measured times, after which
only the allocator's part remains, such as pages between chunks that requests left behind.
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
from crosspool.planner.demand.kv_model import Charge, KVModel
from crosspool.planner.demand.monte_carlo import monte_carlo
from crosspool.planner.demand.quantile import QuantileEstimate
from crosspool.planner.demand.replay import replay as replay_plan
from crosspool.planner.traffic.lengths import Lengths, lognormal
from crosspool.planner.traffic.samples import Floats, ModelTraffic, Samples, Traffic
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import by_lengths
from crosspool.planner.traffic.trace import Trace
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark import plots
from benchmark.client import STREAM_FLAGS, Answer, Replay, replay
from benchmark.made_trace import Load, generate
from benchmark.poisson_runs import run_quantile_interval
from benchmark.pool_sampler import PoolSampler
from benchmark.records import IMAGES, Recorder
from benchmark.server import TINY_MODELS, Server, one_device
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, random_prompt

QUANTILE = 0.99
LEVEL = 0.95
RATES = (1.0, 0.5, 0.25)
"""Requests per second of each model."""
LENGTHS = Lengths(
    prompt=lognormal(mean=700, sigma=0.7, longest=3000),
    output=lognormal(mean=160, sigma=0.6, longest=600),
)
CONTEXT = 4096
CHUNK_BYTES = 2 << 20
PAGE_SIZE = 16
FLAGS = (
    *("--dtype", "float32", "--context-length", str(CONTEXT), "--page-size", str(PAGE_SIZE)),
    *("--kv-pool-bytes", "256MiB", "--chunk-bytes", str(CHUNK_BYTES)),
    # cached prefixes fill what is free, and are no demand; prompts here share none
    *("--disable-radix-cache", *one_device(), *STREAM_FLAGS),
)
COLUMNS: dict[Charge, str] = {"active": "mapped_bytes", "promised": "promised_bytes"}
_VOCAB = 2048
_WARM_UP = 5.0
"""Seconds of the calibration that are left out, as the load has not been reached yet."""
_MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    calibration_seconds: float = 45.0
    seconds: float = 150.0
    simulated_runs: int = 1000
    samples: int = 200_000


QUICK = Setting(calibration_seconds=12.0, seconds=15.0, simulated_runs=100, samples=20_000)


@dataclass(frozen=True)
class Planned:
    """The planner's prediction for one charge, in bytes."""

    at_random_time: QuantileEstimate
    of_one_run: QuantileEstimate


def make_trace(seconds: float, seed: int) -> Trace:
    loads = [
        Load(model=model, rate=rate, lengths=LENGTHS)
        for model, rate in zip(TINY_MODELS, RATES, strict=True)
    ]
    return generate(loads, seconds, seed)


def requests_of(trace: Trace, seed: int) -> list[Request]:
    """Returns requests with exactly the trace's lengths."""
    rng = np.random.default_rng(seed)
    assert trace.arrival is not None and trace.model is not None
    return [
        Request(float(arrival), model, random_prompt(int(prompt), _VOCAB, rng), int(output))
        for arrival, model, prompt, output in zip(
            trace.arrival, trace.model, trace.prompt, trace.output, strict=True
        )
    ]


def fitted_speed(answers: Sequence[Answer]) -> DecodeSpeed:
    """Fits the speed at which ``answers`` came: TTFT as a constant of at least 0 and a rate of
    prompt tokens (least squares), and the mean time per further token."""
    prompt = np.array([len(a.request.prompt) for a in answers], dtype=np.float64)
    ttft = np.array([a.ttft for a in answers])
    seconds_per_token, constant = np.polyfit(prompt, ttft, 1)
    if constant < 0:
        seconds_per_token, constant = prompt @ ttft / (prompt @ prompt), 0.0
    decode = sum(a.pieces[-1][0] - a.pieces[0][0] for a in answers)
    tokens = sum(len(a.tokens) - 1 for a in answers)
    return DecodeSpeed(
        tbt_s=decode / tokens,
        prefill_tokens_per_s=1 / max(float(seconds_per_token), 1e-9),
        ttft_s=float(constant),
    )


def kv_models(server: Server) -> list[KVModel]:
    return [
        KVModel(m["name"], m["kv_bytes_per_token"], PAGE_SIZE, CONTEXT)
        for m in server.status()["models"]
    ]


def plan(speed: DecodeSpeed, models: Sequence[KVModel], setting: Setting) -> dict[Charge, Planned]:
    traffic = by_lengths(LENGTHS, RATES, TINY_MODELS, setting.samples, seed=1, speed=speed)
    planned: dict[Charge, Planned] = {}
    for charge in COLUMNS:
        demand = monte_carlo(
            traffic, models, setting.samples, 2, charge, chunk_bytes=CHUNK_BYTES, progress=False
        )
        run = run_quantile_interval(
            traffic,
            models,
            setting.seconds,
            quantile=QUANTILE,
            runs=setting.simulated_runs,
            level=LEVEL,
            seed=3,
            chunk_bytes=CHUNK_BYTES,
            charge=charge,
            start="empty",
            progress=False,
        )
        planned[charge] = Planned(demand.quantile(QUANTILE, LEVEL), run)
    return planned


def traffic_of(answers: Sequence[Answer], speed: DecodeSpeed | None) -> Traffic:
    """Returns the served requests with service times of ``speed``; None for the measured times."""
    models = []
    seconds = max(answer.done for answer in answers)
    for name in TINY_MODELS:
        own = [answer for answer in answers if answer.request.model == name]
        prompt = np.array([len(a.request.prompt) for a in own], dtype=np.int64)
        output = np.array([len(a.tokens) for a in own], dtype=np.int64)
        served = np.array([a.done - a.request.arrival for a in own])
        service: Floats = served if speed is None else speed.seconds(prompt, output)
        arrivals = np.array([a.request.arrival for a in own])
        samples = Samples(prompt, output, service)
        models.append(ModelTraffic(name, len(own) / seconds, samples, arrivals))
    return Traffic(tuple(models), seconds)


@dataclass(frozen=True)
class Compared:
    """The plan, two replays of the served trace, and the measured use for one charge, in bytes."""

    charge: Charge
    planned: Planned
    replayed: float
    """P99 of the served arrivals with the plan's service times."""
    replayed_as_served: float
    """P99 of the served arrivals with the measured service times."""
    measured: list[float]
    """Samples of the pool's use."""

    @property
    def p99(self) -> float:
        return quantile(self.measured, QUANTILE)

    @property
    def within(self) -> bool:
        return self.planned.of_one_run.low <= self.p99 <= self.planned.of_one_run.high


def compare(
    planned: dict[Charge, Planned],
    answers: Sequence[Answer],
    samples: PoolSampler,
    speed: DecodeSpeed,
    models: Sequence[KVModel],
) -> list[Compared]:
    compared = []
    for charge, column in COLUMNS.items():
        replayed, as_served = (
            replay_plan(traffic_of(answers, own), models, charge, chunk_bytes=CHUNK_BYTES)
            .quantile(QUANTILE)
            .value
            for own in (speed, None)
        )
        measured = samples.column(column).tolist()
        compared.append(Compared(charge, planned[charge], replayed, as_served, measured))
    return compared


@dataclass(frozen=True)
class Run:
    """The served run, and the calibration before it."""

    calibration: Replay
    speed: DecodeSpeed
    served: Replay
    served_speed: DecodeSpeed
    """Decode speed that was fitted to the served run itself."""
    samples: PoolSampler
    compared: list[Compared]
    usage: Usage


def run(setting: Setting, console: Console) -> Run:
    with Progress(console=console, refresh_per_second=2) as progress:
        task = progress.add_task("starting", total=4)

        def stage(text: str) -> None:
            progress.update(task, description=text)
            progress.advance(task)

        with Server(FLAGS) as server:
            models = kv_models(server)
            stage("learning the decode speed")
            trial = requests_of(make_trace(setting.calibration_seconds, seed=11), seed=12)
            calibration = replay(server.url, trial)
            _check(calibration)
            server.wait_idle()
            settled = [a for a in calibration.answers if a.request.arrival >= _WARM_UP]
            speed = fitted_speed(settled)
            stage("planning")
            planned = plan(speed, models, setting)
            stage("serving what was planned")
            load = requests_of(make_trace(setting.seconds, seed=21), seed=22)
            with PoolSampler(server.port) as samples, Usage(server) as usage:
                served = replay(server.url, load)
            _check(served)
        stage("comparing")
        compared = compare(planned, served.answers, samples, speed, models)
    return Run(calibration, speed, served, fitted_speed(served.answers), samples, compared, usage)


def _check(replayed: Replay) -> None:
    """Raises RuntimeError unless every answer is complete, as the plan is for a pool that is large
    enough."""
    failed = [a.error or a.status for a in replayed.answers if not a.complete]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, among them {failed[0]}")


def record(run: Run, setting: Setting) -> Recorder:
    recorder = Recorder("served_plan")
    common: dict[str, Any] = total([run.usage])
    for c in run.compared:
        parameters = {
            "charge": c.charge,
            "rates": RATES,
            "seconds": setting.seconds,
            "quantile": QUANTILE,
            "level": LEVEL,
            "simulated_runs": setting.simulated_runs,
            "chunk_bytes": CHUNK_BYTES,
            "page_size": PAGE_SIZE,
        }
        recorder.add(
            f"pool_{COLUMNS[c.charge]}",
            c.measured,
            "bytes",
            parameters=parameters,
            **common,
            planned_p99=c.planned.at_random_time.value,
            planned_run_p99_low=c.planned.of_one_run.low,
            planned_run_p99_high=c.planned.of_one_run.high,
            replayed_p99=c.replayed,
            replayed_as_served_p99=c.replayed_as_served,
            within=c.within,
        )
    for name, speed in (("planned", run.speed), ("served", run.served_speed)):
        recorder.add(
            f"{name}_tbt",
            [speed.tbt_s],
            "s",
            parameters={"rates": RATES},
            **common,
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            ttft_s=speed.ttft_s,
        )
    return recorder


def table(run: Run) -> Table:
    made = Table(title=f"P{100 * QUANTILE:g} of the KV pool's use, MiB", title_justify="left")
    for title, justify in (
        ("charge", "left"),
        ("plan, random time", "right"),
        (f"plan, one run ({LEVEL:.0%})", "right"),
        ("trace, plan's times", "right"),
        ("trace, served times", "right"),
        ("measured", "right"),
        ("", "left"),
    ):
        made.add_column(title, justify=justify)  # type: ignore[arg-type]
    for c in run.compared:
        interval = c.planned.of_one_run
        made.add_row(
            f"{c.charge} / {COLUMNS[c.charge].partition('_')[0]}",
            f"{c.planned.at_random_time.value / _MIB:.0f}",
            f"{interval.low / _MIB:.0f} to {interval.high / _MIB:.0f}",
            f"{c.replayed / _MIB:.0f}",
            f"{c.replayed_as_served / _MIB:.0f}",
            f"{c.p99 / _MIB:.0f}",
            "within" if c.within else "OUTSIDE",
        )
    return made


def plot(run: Run, path: Path) -> None:
    titles = [f"{COLUMNS[c.charge].partition('_')[0]} bytes, MiB" for c in run.compared]
    figure, axes = plots.panels(titles, columns=1, height=2.4)
    seconds = run.samples.column("seconds")
    seconds -= seconds[0]
    for axis, c in zip(axes, run.compared, strict=True):
        used = np.array(c.measured) / _MIB
        axis.plot(seconds, used, color=plots.COLORS[0], linewidth=0.8, label="measured")
        axis.axhline(c.p99 / _MIB, color=plots.COLORS[0], linestyle="--", label="measured P99")
        interval = c.planned.of_one_run
        axis.axhspan(
            interval.low / _MIB, interval.high / _MIB, color=plots.COLORS[1], alpha=0.2,
            label=f"plan: P99 of one run, {LEVEL:.0%}",
        )  # fmt: skip
        axis.set_ylim(bottom=0)
        axis.set_xlabel("seconds", fontsize=8)
        axis.legend(fontsize=7, frameon=False, loc="upper right")
    plots.save(figure, path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.served_plan", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds, nothing recorded")
    given = parser.parse_args(words)
    setting = QUICK if given.quick else Setting()
    console = Console(width=max(Console().width, 120))
    began = time.monotonic()
    done = run(setting, console)
    if not given.quick:
        console.print(f"rows: {record(done, setting).write()}")
        plot(done, IMAGES / "served_plan.svg")
    console.print(table(done))
    for name, speed in (("planned with", done.speed), ("served with", done.served_speed)):
        console.print(
            f"{name} {1e3 * speed.tbt_s:.1f} ms per token, prefill "
            f"{speed.prefill_tokens_per_s:.0f} tokens/s after {1e3 * speed.ttft_s:.0f} ms"
        )
    console.print(
        f"{len(done.served.answers)} requests, {len(done.samples.samples)} samples, others took "
        f"{total([done.usage])['other_cpu_share']:.0%} of a core, {time.monotonic() - began:.0f} s"
    )
    return 0 if given.quick or all(c.within for c in done.compared) else 1


if __name__ == "__main__":
    sys.exit(main())
