"""Serves the contended regime: what happens as the offered load exceeds what the KV pool holds.

    python -m benchmark.contended [--quick] [--loop host] [--tbt-target-ms T] [--azure CONV.csv]

Three models share a pool that a handful of requests fills. The load is counted in promised KV bytes
per second, where a request is promised pages for its prompt and ``max_tokens``. A load of 1 is what
the pool turns over when its queues are never empty. It is measured at the start of every round,
since it follows the machine's speed of the moment. Admitted requests must keep their time between
tokens while TTFT and 429s take the pressure.

The resident loop serves the checkpoint that engines are compared on, cut to four layers, whose
steps take milliseconds, and outputs have the length that was asked for. The host loop serves the
bundled models, and half of what is promised for outputs goes unused: requests end by themselves, at
a length that the load fixes by a logit bias (which the resident loop would leave to Python).

With ``--azure`` lengths are those of the Azure conversation trace, divided so that 99 in a hundred
requests fit into the models' context; the others are cut to it. The target is three times the
median time between tokens of an uncontended load, which is measured first, and there are five
rounds. This workload was chosen before anything of it was measured.

Both promise policies get the same requests at the same times, in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from crosspool.config.deployment import ConfigError
from crosspool.planner.traffic.trace_files import read_trace
from rich.console import Console
from rich.progress import Progress

from benchmark import checkpoint, machine
from benchmark.client import STREAM_FLAGS, replay
from benchmark.contended_report import PROMISES, Phase, plot, ratio, record, row, table
from benchmark.pool_sampler import PoolSampler
from benchmark.records import IMAGES
from benchmark.server import DEMO, TINY_MODELS, Server, one_device
from benchmark.summary import quantile
from benchmark.usage import Usage
from benchmark.workload import Request, eos_tokens, random_prompt

LIMIT = 1.25
"""Highest good ratio of P99 time between tokens at twice the pool's capacity to that at half."""
POOL_BYTES = 24 << 20
PAGE_SIZE = 16
QUEUE_TIMEOUT = 4.0
CHUNK_TOKENS = 512
"""Most prompt tokens of one step, the server's own default."""
TBT_TARGET_MS = {"resident": 50.0, "host": 12.0}
"""Target time between tokens, by loop. Beside the models' decode steps it leaves room for some
dozens of prompt tokens, so that chunks fill it at every load: a chunk of few tokens already reads
most experts of a layer."""
LAYERS = 4
GROWTH_TOKENS = 64
"""Tokens that the growth policy promises at a time."""
CONTEXT = 1152
FLAGS = (
    *("--context-length", str(CONTEXT), "--page-size", str(PAGE_SIZE)),
    *("--kv-pool-bytes", str(POOL_BYTES), "--queue-timeout", f"{QUEUE_TIMEOUT:g}"),
    *("--growth-tokens", str(GROWTH_TOKENS), "--lanes", str(len(TINY_MODELS))),
    *one_device(),
    *STREAM_FLAGS,
)
PROMPT = (384, 768)
OUTPUT = (64, 256)
"""Fewest and most tokens. Lengths are uniform in between."""
MAX_TOKENS = 320
"""Tokens that the host loop's requests ask for. The resident loop's ask for what they get."""
_VOCAB = 2048
"""Size of the smallest vocabulary of the models."""
_AT_ONCE, _AZURE_AT_ONCE = 12, 36
"""Open requests while capacity is measured: more than the pool holds."""
UNCONTENDED = 0.25
"""Load whose median time between tokens the target is a multiple of, with ``--azure``."""
TARGET_FACTOR = 3.0
AZURE_ROUNDS, AZURE_SATURATING = 5, 90


@dataclass(frozen=True)
class Plan:
    """Amount of what is measured."""

    loads: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    rounds: int = 3
    seconds: float = 16.0
    """Length of one load in one round."""
    saturating: int = 30
    """Requests that measure the pool's capacity in one round."""
    loop: str = "resident"
    tbt_target_ms: float = TBT_TARGET_MS["resident"]
    chunk_tokens: int = CHUNK_TOKENS
    lengths: tuple[tuple[int, int], ...] = ()
    """Prompt and output tokens in pairs to draw from. Without any, both are uniform."""

    @property
    def at_once(self) -> int:
        return _AZURE_AT_ONCE if self.lengths else _AT_ONCE

    @property
    def dtype(self) -> str:
        return "float32" if self.loop == "host" else "bfloat16"

    def models(self) -> list[Path]:
        if self.loop == "host":
            return [DEMO / model for model in TINY_MODELS]
        return checkpoint.models(len(TINY_MODELS), layers=LAYERS)

    def request(self, model: str, arrival: float, rng: np.random.Generator) -> Request:
        if self.lengths:
            tokens, length = self.lengths[int(rng.integers(len(self.lengths)))]
            return Request(arrival, model, random_prompt(tokens, _VOCAB, rng), length)
        prompt = random_prompt(int(rng.integers(PROMPT[0], PROMPT[1] + 1)), _VOCAB, rng)
        length = int(rng.integers(OUTPUT[0], OUTPUT[1] + 1))
        if self.loop == "resident":
            return Request(arrival, model, prompt, length)
        return Request(arrival, model, prompt, MAX_TOKENS, length, eos_tokens()[model])


QUICK = Plan(loads=(0.5, 2.0), rounds=1, seconds=6.0)


def azure_lengths(trace: Path) -> tuple[tuple[int, int], ...]:
    """Return the trace's pairs of prompt and output tokens, divided so that the 99th percentile of
    their sums is the models' context; what is longer is cut. Raises ConfigError."""
    found = read_trace(trace)
    divisor = quantile((found.prompt + found.output).tolist(), 0.99) / CONTEXT
    pairs = [
        (max(1, int(p / divisor)), min(CONTEXT // 2, max(2, int(o / divisor))))
        for p, o in zip(found.prompt, found.output, strict=True)
    ]
    return tuple((min(prompt, CONTEXT - output), output) for prompt, output in pairs)


def promised_bytes(request: Request, per_token: dict[str, int]) -> int:
    """Return the KV bytes that admission promises ``request`` in the worst case, in whole pages."""
    pages = -(-(len(request.prompt) + request.max_tokens) // PAGE_SIZE)
    return pages * PAGE_SIZE * per_token[request.model]


def make_load(plan: Plan, rate: float, seed: Sequence[int]) -> list[Request]:
    """Draw arrivals of a Poisson process, given that exactly as many come as ``rate`` says, evenly
    from all models. Short loads then are what their name says."""
    names = [path.name for path in plan.models()]
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.uniform(0, plan.seconds, max(1, round(rate * plan.seconds))))
    models = rng.permutation(np.arange(len(arrivals)) % len(names))
    return [
        plan.request(names[model], float(arrival), rng)
        for model, arrival in zip(models, arrivals, strict=True)
    ]


def capacity(plan: Plan, server: Server, per_token: dict[str, int], requests: int) -> float:
    """Return the promised bytes per second that complete while requests always wait."""
    rng = np.random.default_rng(7)
    names = list(per_token)
    backlog = [plan.request(names[i % len(names)], 0.0, rng) for i in range(requests)]
    answers = replay(server.url, backlog, at_once=plan.at_once).answers
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


def start(plan: Plan, promise: str, stack: ExitStack) -> Server:
    """Start the server of one promise policy."""
    flags = [
        *(*FLAGS, "--loop", plan.loop, "--dtype", plan.dtype, "--promise", promise),
        *("--tbt-target-ms", f"{plan.tbt_target_ms:g}"),
        *("--chunked-prefill-size", str(plan.chunk_tokens)),
    ]
    return stack.enter_context(Server(flags, [str(path) for path in plan.models()]))


def warmed(plan: Plan, server: Server) -> dict[str, int]:
    """Have a server make every buffer that is made at first use; return the KV bytes of a token of
    each model."""
    per_token = {m["name"]: m["kv_bytes_per_token"] for m in server.status()["models"]}
    capacity(plan, server, per_token, plan.at_once)
    return per_token


def target_of(plan: Plan, promise: str) -> float:
    """Return the multiple, in ms, of the median time between tokens under an uncontended load."""
    with ExitStack() as stack:
        server = start(plan, promise, stack)
        per_token = warmed(plan, server)
        full = capacity(plan, server, per_token, plan.saturating)
        rate = UNCONTENDED * full / _mean_promised(plan, per_token)
        phase = measure(server, promise, UNCONTENDED, 0, make_load(plan, rate, (99,)))
    return round(TARGET_FACTOR * 1e3 * quantile(phase.tbt, 0.5), 1)


def run(plan: Plan, promises: Sequence[str], console: Console) -> tuple[list[Phase], list[float]]:
    """Return every phase, and the pool's capacity by round, in promised bytes per second."""
    phases: list[Phase] = []
    capacities: list[float] = []
    turns = plan.rounds * (len(plan.loads) * len(promises) + 1)
    with Progress(console=console, refresh_per_second=2) as progress, ExitStack() as stack:
        task = progress.add_task("starting", total=turns)
        servers = {promise: start(plan, promise, stack) for promise in promises}
        per_token: dict[str, int] = {}
        for server in servers.values():
            per_token = warmed(plan, server)
        mean_bytes = _mean_promised(plan, per_token)
        for turn in range(plan.rounds):
            progress.update(task, description=f"round {turn + 1}, capacity of the pool")
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


def name(plan: Plan) -> str:
    """Return the name of the record and the plot."""
    parts = ["contended"]
    if plan.lengths:
        return "contended_azure"
    if plan.loop != "resident":
        parts.append(plan.loop)
    if plan.tbt_target_ms != TBT_TARGET_MS[plan.loop]:
        parts.append(f"target_{plan.tbt_target_ms:g}")
    if plan.chunk_tokens != CHUNK_TOKENS:
        parts.append(f"chunk_{plan.chunk_tokens}")
    return "_".join(parts)


def constants(plan: Plan, capacities: Sequence[float]) -> dict[str, Any]:
    """Return the parameters of the run, which every record has."""
    lengths: dict[str, Any] = {"prompt": PROMPT, "output": OUTPUT}
    if plan.lengths:
        means = np.mean(plan.lengths, axis=0).tolist()
        lengths = {"trace": "azure-conversation", "mean_prompt": means[0], "mean_output": means[1]}
    return {
        **lengths,
        "loop": plan.loop,
        "tbt_target_ms": plan.tbt_target_ms,
        "capacity_bytes_per_s": [round(full) for full in capacities],
        "kv_pool_bytes": POOL_BYTES,
        "chunked_prefill_size": plan.chunk_tokens,
        "growth_tokens": GROWTH_TOKENS,
        "max_tokens": MAX_TOKENS,
        "queue_timeout": QUEUE_TIMEOUT,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.contended", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="takes seconds and records nothing")
    parser.add_argument("--promise", choices=PROMISES, nargs="+", default=PROMISES)
    parser.add_argument("--loop", choices=tuple(TBT_TARGET_MS), default="resident")
    parser.add_argument(
        "--tbt-target-ms",
        type=float,
        help="the servers' target time between tokens, in ms; 0 takes chunks of a fixed size",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=CHUNK_TOKENS, help="the servers' largest prompt chunk"
    )
    parser.add_argument(
        "--azure", type=Path, help="the Azure conversation trace (CSV), for lengths; five rounds"
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
    if given.azure is not None:
        try:
            plan = replace(plan, lengths=azure_lengths(given.azure), rounds=AZURE_ROUNDS)
        except ConfigError as error:
            console.print(f"error: {error}", markup=False)
            return 2
        plan = replace(plan, saturating=AZURE_SATURATING)
        plan = replace(plan, tbt_target_ms=target_of(plan, given.promise[0]))
        console.print(f"target: {plan.tbt_target_ms:g} ms")
    phases, capacities = run(plan, given.promise, console)
    rows = [
        row([p for p in phases if (p.promise, p.load) == (promise, load)])
        for promise in given.promise
        for load in plan.loads
    ]
    ratios = {promise: ratio(phases, promise) for promise in given.promise}
    if not given.quick:
        console.print(
            f"rows: {record(phases, rows, ratios, name(plan), constants(plan, capacities)).write()}"
        )
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
