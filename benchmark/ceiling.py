"""Measures how many ranks and models one scheduler serves: its core, over simulated ranks.

    python -m benchmark.ceiling [--ranks 1 10 100 1000 10000] [--models 1 10 100 1000]
                                [--requests 4] [--step-ms 10] [--seconds 10] [--limit-gib 8]

No process runs but the core: attention ranks are a queue of steps, each of which ends ``--step-ms``
after it was issued, on the real clock. Every rank has ``--requests`` requests at any time, of
models chosen at random, with prompts of 64 tokens and 64 tokens to write; whoever ends is followed
by another. In each turn the core takes all results that have come, as the scheduler's process does.

For each number of ranks and models: seconds and memory to make the core, steps per second that it
keeps up with over those that its ranks could make, and the time that a turn and a step take of it.
A case that needs more memory than the limit or more than a minute to be made is told as such. All
of it is the core alone: sockets, messages and tokens' text come on top.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import psutil
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.models.spec import DenseFFN, GQASpec, ModelSpec, RopeSpec
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.request import GenerateRequest, StopRules
from crosspool.transport.messages import (
    Logprobs,
    Recall,
    RowResult,
    Sampling,
    Step,
    StepResult,
)
from rich.console import Console
from rich.table import Table

from benchmark import machine
from benchmark.records import Recorder
from benchmark.summary import quantile

PROMPT, OUTPUT = 64, 64
MAKE_SECONDS = 60.0
"""Longest time that making a core may take."""
_KV_BYTES = 16 << 30
"""KV memory of each rank."""
_COLUMNS = (
    "ranks", "models", "made in", "memory", "steps/s", "of its ranks'", "a turn: P50", "P99",
    "a step",
)  # fmt: skip
_SPEC = ModelSpec(
    family="qwen3_moe",
    hidden=2048,
    vocab=151_936,
    context=8192,
    dtype="bfloat16",
    norm_eps=1e-6,
    tied_embeddings=False,
    attention=GQASpec(
        q_heads=32, kv_heads=4, head_dim=128, scale=0.088, rope=RopeSpec(dim=128, interleaved=False)
    ),
    ffn=(DenseFFN(intermediate=768),) * 48,
    eos_token_ids=(0,),
)
"""The KV cache of Qwen3-30B-A3B."""


@dataclass(frozen=True)
class Case:
    ranks: int
    models: int
    requests: int
    """Requests of each rank at any time."""
    step_s: float
    seconds: float
    limit_bytes: int


@dataclass(frozen=True)
class Outcome:
    make_s: float
    bytes: int
    """Memory that the core takes before its first request."""
    turns_s: list[float]
    """What each turn took of the core."""
    steps: int
    most_steps: float
    """Steps that the ranks would have made, had each always had one to make."""
    cpu_s: float
    wall_s: float

    @property
    def core_per_step_s(self) -> float:
        return sum(self.turns_s) / max(1, self.steps)


class _Ranks:
    """Attention ranks that end each step after the same time."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._due: list[tuple[float, int, int, Step, int]] = []
        """Time, number, rank, step, and the steps that its lease has left."""
        self._number = 0
        self._free_at = [0.0] * case.ranks
        """When a rank has made all steps that it was given: it makes one after another."""
        self._recalled: dict[int, set[int]] = defaultdict(set)

    def receive(self, rank: int, message: Any, now: float) -> None:
        if isinstance(message, Step):
            self._push(rank, message, message.lease, now)
        elif isinstance(message, Recall):
            self._recalled[rank].add(message.step)

    def _push(self, rank: int, step: Step, left: int, now: float) -> None:
        self._free_at[rank] = max(now, self._free_at[rank]) + self._case.step_s
        self._number += 1
        heapq.heappush(self._due, (self._free_at[rank], self._number, rank, step, left))

    def results(self, now: float) -> list[tuple[int, StepResult]]:
        """Return the results that have come."""
        come = []
        while self._due and self._due[0][0] <= now:
            at, _, rank, step, left = heapq.heappop(self._due)
            more = left > 1 and step.step not in self._recalled[rank]
            if more:
                self._push(rank, step, left - 1, at)
            else:
                self._recalled[rank].discard(step.step)
            rows = [
                RowResult(request=row.request, token=1 if row.sample else -1) for row in step.rows
            ]
            come.append((rank, StepResult(step=step.step, rows=rows, more=more)))
        return come

    def wait(self) -> None:
        """Return when the next result has come."""
        if self._due:
            time.sleep(max(0.0, self._due[0][0] - time.monotonic()))


class _NoText:
    def decode(self, ids: list[int]) -> str:
        return ""


def deployment(case: Case) -> Deployment:
    """Return one with the weights of all models in its pool."""
    return Deployment(
        models={n: ModelConfig(name=f"model{n}", path="/none") for n in range(case.models)},
        next_model=case.models,
        kv_pool_devices=tuple(Device(f"cuda:{n}") for n in range(case.ranks)),
        weight_pool_devices=(Device(f"cuda:{case.ranks}"),),
        kv_pool_bytes=case.ranks * _KV_BYTES,
        weight_pool_bytes=1 << 50,
        max_queued_requests=case.ranks * case.requests,
    )


def run(case: Case) -> Outcome:
    """Measure one case in this process."""
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    tools: Any = ModelTools(spec=_SPEC, decoder=_NoText(), grammars=None)  # type: ignore[arg-type]
    core = SchedulerCore(deployment(case), dict.fromkeys(range(case.models), tools), time.monotonic)
    make_s, taken = time.monotonic() - began, psutil.Process().memory_info().rss - before
    ranks, random = _Ranks(case), Random(0)

    def add(number: int) -> None:
        prompt = [random.randrange(1, 151_936) for _ in range(PROMPT)]
        core.add(
            GenerateRequest(
                rid=str(number),
                model=random.randrange(case.models),
                input_ids=prompt,
                sampling=Sampling(seed=number),
                stop=StopRules(max_new_tokens=OUTPUT, ignore_eos=True),
                logprobs=Logprobs(),
            )
        )

    total = case.ranks * case.requests
    for number in range(total):
        add(number)
    turns: list[float] = []
    steps, ended = 0, 0
    began, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < case.seconds:
        results = ranks.results(time.monotonic())
        turn = time.perf_counter()
        for rank, result in results:
            core.on_result(rank, result)
        for _ in range(ended):
            add(total)
            total += 1
        core.schedule()
        messages, outputs = core.drain_messages(), core.drain_outputs()
        turns.append(time.perf_counter() - turn)
        now = time.monotonic()
        for rank, message in messages:
            ranks.receive(rank, message, now)
        steps += len(results)
        finishes = [output.finish for output in outputs if output.finish is not None]
        if bad := [finish for finish in finishes if finish.kind != "length"]:
            raise RuntimeError(f"a request ended otherwise than by its length: {bad[0]}")
        ended = len(finishes)
        ranks.wait()
    wall = time.monotonic() - began
    return Outcome(
        make_s, taken, turns, steps, case.ranks * wall / case.step_s,
        time.process_time() - cpu, wall,
    )  # fmt: skip


def _child(case: Case, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (case.limit_bytes, case.limit_bytes))
    try:
        pipe.send(run(case))
    except MemoryError:
        pipe.send(f"more than {case.limit_bytes >> 30} GiB")


def apart(case: Case) -> Outcome | str:
    """Measure one case in a process of its own; return why there is nothing where there isn't."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, theirs), daemon=True)
    process.start()
    theirs.close()
    limit = MAKE_SECONDS + 3 * case.seconds
    try:
        if not ours.poll(limit):
            return f"more than {limit:g} s"
        told: Outcome | str = ours.recv()
        return told
    except EOFError:
        return "its process ended"
    finally:
        process.kill()
        process.join()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.ceiling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--models", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--requests", type=int, default=4, help="of each rank (default 4)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="time of a step (default 10)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case (default 10)")
    parser.add_argument("--limit-gib", type=int, default=8, help="most memory (default 8)")
    parser.add_argument("--quick", action="store_true", help="record nothing")
    given = parser.parse_args(words)
    recorder, table = Recorder("ceiling"), Table(title="One scheduler's core")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for ranks in given.ranks:
        for models in given.models:
            case = Case(
                ranks, models, given.requests, given.step_ms / 1e3, given.seconds,
                given.limit_gib << 30,
            )  # fmt: skip
            load1, told = machine.load1(), apart(case)
            if isinstance(told, str):
                table.add_row(f"{ranks:,}", f"{models:,}", told)
                recorder.add(
                    "turn", [], "s", parameters=_parameters(case), cpu_s=0.0, wall_s=0.0,
                    load1=load1, failed=told,
                )  # fmt: skip
                continue
            table.add_row(
                f"{ranks:,}", f"{models:,}", f"{told.make_s:.2f} s",
                f"{told.bytes / 2**20:,.0f} MiB",
                f"{told.steps / told.wall_s:,.0f}", f"{told.steps / told.most_steps:.0%}",
                f"{1e3 * quantile(told.turns_s, 0.5):.2f} ms",
                f"{1e3 * quantile(told.turns_s, 0.99):.2f} ms",
                f"{1e6 * told.core_per_step_s:,.0f} µs",
            )  # fmt: skip
            recorder.add(
                "turn", told.turns_s, "s", parameters=_parameters(case), cpu_s=told.cpu_s,
                wall_s=told.wall_s, load1=load1, make_s=told.make_s, memory_bytes=told.bytes,
                steps=told.steps, share_of_ranks=told.steps / told.most_steps,
                core_s_per_step=told.core_per_step_s,
            )  # fmt: skip
    console = Console()
    console.print(table)
    if not given.quick:
        console.print(f"rows: {recorder.write()}")
    return 0


def _parameters(case: Case) -> dict[str, Any]:
    return {
        "ranks": case.ranks, "models": case.models, "requests": case.requests,
        "step_s": case.step_s, "seconds": case.seconds, "prompt": PROMPT, "output": OUTPUT,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
