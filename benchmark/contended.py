"""The contended regime, served: what happens as the offered load passes what the KV pool holds.

    python -m benchmark.contended [--quick] [--loop host] [--tbt-target-ms T]

Three models share a pool that is too small for them: a handful of requests fills it. The load is
counted in promised KV bytes per second, a request's being the pages for its prompt and for
``max_tokens``; 1 is what the pool turns over when its queues are never empty, measured at the
beginning of every round, since it follows the machine's speed of the moment. Admitted requests must
keep their time between tokens while TTFT and 429s take the pressure.

The resident loop serves models of four layers of the checkpoint that engines are compared on, whose
steps take milliseconds, and answers have the length that was asked for. The host loop serves the
bundled models, and half of what is promised for answers goes unused: requests end by themselves, at
a length that the load fixes (by a logit bias, which the resident loop would leave to Python).

The loads of both promise policies are the same requests at the same times, in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark import checkpoint, machine, plots
from benchmark.client import STREAM_FLAGS, Replay, replay
from benchmark.pool_sampler import PoolSample, PoolSampler
from benchmark.records import IMAGES, Recorder
from benchmark.server import DEMO, TINY_MODELS, Server, one_device
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, eos_tokens, random_prompt

PROMISES = ("worst_case", "growth")
LIMIT = 1.25
"""P99 time between tokens at twice the pool's capacity, over that at half of it, at most."""
POOL_BYTES = 12 << 20
PAGE_SIZE = 16
QUEUE_TIMEOUT = 4.0
CHUNK_TOKENS = 512
"""Prompt tokens of one step at most, the server's own default."""
TBT_TARGET_MS = {"resident": 40.0, "host": 12.0}
"""By loop: beside the models' decode steps it leaves room for some dozens of prompt tokens, so that
chunks fill it at every load."""
LAYERS = 4
GROWTH_TOKENS = 64
"""What the growth policy promises at a time."""
FLAGS = (
    *("--context-length", "1024", "--page-size", str(PAGE_SIZE)),
    *("--kv-pool-bytes", str(POOL_BYTES), "--queue-timeout", f"{QUEUE_TIMEOUT:g}"),
    *("--growth-tokens", str(GROWTH_TOKENS)),
    *one_device(),
    *STREAM_FLAGS,
)
PROMPT = (256, 512)
OUTPUT = (128, 448)
"""Shortest and longest, uniform in between; tokens."""
MAX_TOKENS = 512
_VOCAB = 2048
"""Of all models, at least."""
_AT_ONCE = 10
"""More requests than the pool holds."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    loads: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    rounds: int = 3
    seconds: float = 16.0
    """Length of one load in one round."""
    saturating: int = 20
    """Requests that measure the pool's capacity in one round."""
    loop: str = "resident"
    tbt_target_ms: float = TBT_TARGET_MS["resident"]
    chunk_tokens: int = CHUNK_TOKENS

    @property
    def dtype(self) -> str:
        return "float32" if self.loop == "host" else "bfloat16"

    def models(self) -> list[Path]:
        if self.loop == "host":
            return [DEMO / model for model in TINY_MODELS]
        return checkpoint.models(len(TINY_MODELS), layers=LAYERS)

    def request(self, model: str, arrival: float, rng: np.random.Generator) -> Request:
        prompt = random_prompt(int(rng.integers(PROMPT[0], PROMPT[1] + 1)), _VOCAB, rng)
        length = int(rng.integers(OUTPUT[0], OUTPUT[1] + 1))
        if self.loop == "resident":
            return Request(arrival, model, prompt, length)
        return Request(arrival, model, prompt, MAX_TOKENS, length, eos_tokens()[model])


QUICK = Plan(loads=(0.5, 2.0), rounds=1, seconds=6.0)


@dataclass(frozen=True)
class Phase:
    """One load on one server in one round."""

    promise: str
    load: float
    round: int
    replay: Replay
    samples: PoolSampler
    usage: Usage
    pauses: int
    """Times that a running request waited for more pages (growth only)."""

    @property
    def tbt(self) -> list[float]:
        return [gap for answer in self.replay.answers if answer.complete for gap in answer.tbt]


def promised_bytes(request: Request, per_token: dict[str, int]) -> int:
    """KV bytes that admission promises ``request`` in the worst case, in whole pages."""
    pages = -(-(len(request.prompt) + request.max_tokens) // PAGE_SIZE)
    return pages * PAGE_SIZE * per_token[request.model]


def make_load(plan: Plan, rate: float, seed: Sequence[int]) -> list[Request]:
    """Arrivals of a Poisson process that has brought just as many as ``rate`` says by its end, of
    every model alike, so that short loads are what they are called."""
    names = [path.name for path in plan.models()]
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.uniform(0, plan.seconds, max(1, round(rate * plan.seconds))))
    models = rng.permutation(np.arange(len(arrivals)) % len(names))
    return [
        plan.request(names[model], float(arrival), rng)
        for model, arrival in zip(models, arrivals, strict=True)
    ]


def capacity(plan: Plan, server: Server, per_token: dict[str, int], requests: int) -> float:
    """Promised bytes per second that complete while requests always wait."""
    rng = np.random.default_rng(7)
    names = list(per_token)
    backlog = [plan.request(names[i % len(names)], 0.0, rng) for i in range(requests)]
    answers = replay(server.url, backlog, at_once=_AT_ONCE).answers
    if failed := [answer.error for answer in answers if answer.error]:
        raise RuntimeError(f"while the pool's capacity was measured: {failed}")
    complete = [answer for answer in answers if answer.complete]
    begin, end = min(a.done for a in complete), max(a.sent for a in answers)
    done = [a for a in complete if begin < a.done <= end]
    return sum(promised_bytes(a.request, per_token) for a in done) / (end - begin)


def measure(server: Server, promise: str, load: float, turn: int, requests: list[Request]) -> Phase:
    server.wait_idle()
    before = _pauses(server)
    with PoolSampler(server.port) as samples, Usage(server) as usage:
        replayed = replay(server.url, requests)
    pauses = _pauses(server) - before
    return Phase(promise, load, turn, replayed, samples, usage, pauses)


def _pauses(server: Server) -> int:
    return sum(model["pauses"] for model in server.status()["models"])


def run(plan: Plan, promises: Sequence[str], console: Console) -> tuple[list[Phase], list[float]]:
    """Every phase, and by round the pool's capacity in promised bytes per second."""
    phases: list[Phase] = []
    capacities: list[float] = []
    turns = plan.rounds * (len(plan.loads) * len(promises) + 1)
    with Progress(console=console, refresh_per_second=2) as progress, ExitStack() as stack:
        task = progress.add_task("starting", total=turns)
        models = [str(path) for path in plan.models()]
        flags = [
            *(
                *FLAGS,
                "--loop",
                plan.loop,
                "--dtype",
                plan.dtype,
                "--tbt-target-ms",
                f"{plan.tbt_target_ms:g}",
            ),
            *("--chunked-prefill-size", str(plan.chunk_tokens)),
        ]
        servers = {
            promise: stack.enter_context(Server([*flags, "--promise", promise], models))
            for promise in promises
        }
        status = next(iter(servers.values())).status()
        per_token = {m["name"]: m["kv_bytes_per_token"] for m in status["models"]}
        for server in servers.values():
            capacity(plan, server, per_token, 12)  # every lazily made buffer of the processes
        mean_bytes = _mean_promised(plan, per_token)
        for turn in range(plan.rounds):
            progress.update(task, description=f"round {turn + 1}, what the pool turns over")
            full = capacity(plan, servers[promises[0]], per_token, plan.saturating)
            capacities.append(full)
            progress.advance(task)
            for load in plan.loads[:: -1 if turn % 2 else 1]:
                requests = make_load(plan, load * full / mean_bytes, (turn, round(100 * load)))
                for promise, server in servers.items():
                    progress.update(task, description=f"round {turn + 1}, load {load:g}, {promise}")
                    phases.append(measure(server, promise, load, turn, requests))
                    progress.advance(task)
    return phases, capacities


def _mean_promised(plan: Plan, per_token: dict[str, int]) -> float:
    rng = np.random.default_rng(0)
    drawn = [plan.request(model, 0.0, rng) for model in per_token for _ in range(200)]
    return float(np.mean([promised_bytes(r, per_token) for r in drawn]))


@dataclass(frozen=True)
class Row:
    """All rounds of one load under one promise policy."""

    promise: str
    load: float
    ttft: list[float]
    tbt: list[float]
    offered: int
    complete: int
    refused: int
    failures: list[str]
    retry_after: list[int]
    """Of each 429 that carried one, seconds."""
    output_tokens_per_s: float
    promised_share: float
    """Mean share of the pool that is promised to running requests, while the load arrives."""
    written_share: float
    """The part of it that holds tokens."""
    running: int
    """Most requests at once."""
    pauses: int
    client_cpu_share: float
    """Of one core."""
    lateness: float
    """P99 of the seconds by which the client sent a request late."""
    usage: dict[str, Any]
    """As in every record."""


def row(phases: Sequence[Phase]) -> Row:
    answers = [answer for phase in phases for answer in phase.replay.answers]
    complete = [answer for answer in answers if answer.complete]
    refused = [answer for answer in answers if answer.refused]
    wall = sum(phase.replay.seconds for phase in phases)
    client = sum(phase.replay.client_cpu_s for phase in phases)
    return Row(
        promise=phases[0].promise,
        load=phases[0].load,
        ttft=[answer.ttft for answer in complete],
        tbt=[gap for phase in phases for gap in phase.tbt],
        offered=len(answers),
        complete=len(complete),
        refused=len(refused),
        failures=[a.error or str(a.status) for a in answers if not a.complete and not a.refused],
        retry_after=[a.retry_after for a in refused if a.retry_after is not None],
        output_tokens_per_s=sum(len(a.tokens) for a in complete) / wall,
        promised_share=_mean_share(phases, lambda s: s.promised_bytes),
        written_share=_mean_share(phases, lambda s: s.mapped_bytes - s.cached_bytes),
        running=max(s.running for phase in phases for s in phase.samples.samples),
        pauses=sum(phase.pauses for phase in phases),
        client_cpu_share=client / wall,
        lateness=quantile([late for p in phases for late in p.replay.lateness], 0.99),
        usage=total([phase.usage for phase in phases]),
    )


def _mean_share(phases: Sequence[Phase], used: Callable[[PoolSample], int]) -> float:
    """Share of the pool that is ``used``, over the time in which a load arrives."""
    shares = []
    for phase in phases:
        samples = phase.samples.samples
        last = max(answer.request.arrival for answer in phase.replay.answers)
        shares += [
            used(s) / s.budget_bytes for s in samples if s.seconds <= samples[0].seconds + last
        ]
    return float(np.mean(shares))


@dataclass(frozen=True)
class Ratio:
    """P99 time between tokens at the highest load over that at the lowest."""

    pooled: float
    """Of all rounds together."""
    by_round: list[float]


def ratio(phases: Sequence[Phase], promise: str) -> Ratio:
    own = [phase for phase in phases if phase.promise == promise]
    low, high = (edge(phase.load for phase in own) for edge in (min, max))

    def between(some: Sequence[Phase]) -> float:
        lower, higher = (
            quantile([gap for phase in some if phase.load == load for gap in phase.tbt], 0.99)
            for load in (low, high)
        )
        return higher / lower

    rounds = sorted({phase.round for phase in own})
    return Ratio(between(own), [between([p for p in own if p.round == n]) for n in rounds])


def name(plan: Plan) -> str:
    """Of the record and the plot."""
    parts = ["contended"]
    if plan.loop != "resident":
        parts.append(plan.loop)
    if plan.tbt_target_ms != TBT_TARGET_MS[plan.loop]:
        parts.append(f"target_{plan.tbt_target_ms:g}")
    if plan.chunk_tokens != CHUNK_TOKENS:
        parts.append(f"chunk_{plan.chunk_tokens}")
    return "_".join(parts)


def record(
    phases: Sequence[Phase],
    rows: Sequence[Row],
    ratios: dict[str, Ratio],
    plan: Plan,
    capacities: Sequence[float],
) -> Recorder:
    recorder = Recorder(name(plan))
    constant = {
        "loop": plan.loop,
        "tbt_target_ms": plan.tbt_target_ms,
        "capacity_bytes_per_s": [round(full) for full in capacities],
        "kv_pool_bytes": POOL_BYTES,
        "chunked_prefill_size": plan.chunk_tokens,
        "growth_tokens": GROWTH_TOKENS,
        "prompt": PROMPT,
        "output": OUTPUT,
        "max_tokens": MAX_TOKENS,
        "queue_timeout": QUEUE_TIMEOUT,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
    }
    for promise, both in ratios.items():
        recorder.add(
            "tbt_p99_ratio",
            both.by_round,
            "1",
            parameters={"promise": promise, **constant},
            **total([phase.usage for phase in phases if phase.promise == promise]),
            pooled=both.pooled,
        )
    for r in rows:
        common: dict[str, Any] = {
            "parameters": {"load": r.load, "promise": r.promise, **constant},
            **r.usage,
        }
        recorder.add("tbt", r.tbt, "s", **common, p999=quantile(r.tbt, 0.999), longest=max(r.tbt))
        recorder.add(
            "ttft",
            r.ttft,
            "s",
            **common,
            offered=r.offered,
            complete=r.complete,
            refused=r.refused,
            failed=len(r.failures),
            retry_after_median=float(np.median(r.retry_after)) if r.retry_after else None,
            output_tokens_per_s=r.output_tokens_per_s,
            promised_share=r.promised_share,
            written_share=r.written_share,
            most_running=r.running,
            pauses=r.pauses,
            client_cpu_share=r.client_cpu_share,
            client_lateness_p99=r.lateness,
        )
    return recorder


def table(rows: Sequence[Row]) -> Table:
    made = Table(
        title="Offered load against the KV pool's capacity", title_justify="left", box=box.SIMPLE
    )
    made.add_column("promise", no_wrap=True)
    for title in (
        *("load", "TBT ms\nP50, P99", "TTFT s\nP50, P99", "whole\nanswers", "429", "failed"),
        *("tokens\nper s", "pool\npromised", "pool\nwritten", "most\nat once", "pauses"),
        *("client\nCPU", "others'\nCPU"),
    ):
        made.add_column(title, justify="right", no_wrap=True)
    for r in rows:
        tbt = [1e3 * quantile(r.tbt, q) for q in (0.5, 0.99)]
        ttft = [quantile(r.ttft, q) for q in (0.5, 0.99)]
        made.add_row(
            r.promise,
            f"{r.load:g}",
            f"{tbt[0]:.1f}, {tbt[1]:.1f}",
            f"{ttft[0]:.2f}, {ttft[1]:.2f}",
            f"{r.complete} of {r.offered}",
            f"{r.refused}",
            f"{len(r.failures)}",
            f"{r.output_tokens_per_s:.0f}",
            f"{r.promised_share:.0%}",
            f"{r.written_share:.0%}",
            f"{r.running}",
            f"{r.pauses}",
            f"{r.client_cpu_share:.0%}",
            f"{r.usage['other_cpu_share']:.0%}",
        )
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    figure, (tbt, ttft, refused, used) = plots.panels(
        (
            "Time between tokens, ms",
            "Time to first token, s",
            "Answered with 429, %",
            "KV pool, % of its bytes",
        )
    )
    for promise, color in zip(PROMISES, plots.COLORS, strict=False):
        own = [r for r in rows if r.promise == promise]
        if not own:
            continue
        loads = [r.load for r in own]
        label = promise.replace("_", " ")
        for q, style in ((0.5, "--"), (0.99, "-")):
            name = f"{label}, P{100 * q:g}"
            tbt.plot(loads, [1e3 * quantile(r.tbt, q) for r in own], style, color=color, label=name)
            ttft.plot(loads, [quantile(r.ttft, q) for r in own], style, color=color, label=name)
        shares = [100 * r.refused / r.offered for r in own]
        refused.plot(loads, shares, "-", color=color, label=label)
        used.plot(loads, [100 * r.promised_share for r in own], "-", color=color)
        used.plot(loads, [100 * r.written_share for r in own], ":", color=color)
    used.plot([], [], "-", color="black", label="promised")
    used.plot([], [], ":", color="black", label="written")
    for axis in (tbt, ttft, refused, used):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
        axis.set_xlabel("offered load, of the pool's capacity", fontsize=8)
    plots.save(figure, path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.contended", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds, nothing recorded")
    parser.add_argument("--promise", choices=PROMISES, nargs="+", default=PROMISES)
    parser.add_argument("--loop", choices=tuple(TBT_TARGET_MS), default="resident")
    parser.add_argument(
        "--tbt-target-ms",
        type=float,
        help="the servers' target for the time between tokens; 0: chunks of a fixed size",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=CHUNK_TOKENS, help="the servers' chunked prefill size"
    )
    given = parser.parse_args(words)
    target = TBT_TARGET_MS[given.loop] if given.tbt_target_ms is None else given.tbt_target_ms
    plan = replace(
        QUICK if given.quick else Plan(),
        loop=given.loop,
        tbt_target_ms=target,
        chunk_tokens=given.chunk_tokens,
    )
    console = Console(width=max(Console().width, 140))
    began = time.monotonic()
    phases, capacities = run(plan, given.promise, console)
    rows = [
        row([p for p in phases if (p.promise, p.load) == (promise, load)])
        for promise in given.promise
        for load in plan.loads
    ]
    ratios = {promise: ratio(phases, promise) for promise in given.promise}
    if not given.quick:
        console.print(f"rows: {record(phases, rows, ratios, plan, capacities).write()}")
        plot(rows, IMAGES / f"{name(plan)}.svg")
    console.print(table(rows))
    console.print(
        f"capacity {', '.join(f'{full / 2**20:.1f}' for full in capacities)} MiB of promised KV "
        f"per second, load average {machine.load1():.1f}, {time.monotonic() - began:.0f} s"
    )
    failures = [failure for r in rows for failure in r.failures]
    for failure in failures[:5]:
        console.print(f"failed: {failure}", markup=False)
    for promise, both in ratios.items():
        verdict = "within" if both.pooled <= LIMIT else "BEYOND"
        console.print(
            f"{promise}: P99 time between tokens at load {plan.loads[-1]:g} is {both.pooled:.2f} "
            f"times that at {plan.loads[0]:g}, {verdict} {LIMIT:g}; by round "
            + ", ".join(f"{value:.2f}" for value in both.by_round)
        )
    beyond = any(both.pooled > LIMIT for both in ratios.values())
    return 1 if failures or (beyond and not given.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
