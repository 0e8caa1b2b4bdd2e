"""Drive the scheduler's core without any process: requests go in, steps and outputs come out.

A simulator, a test or another server can embed it like this. The attention rank here is ten lines:
it carries out every step at once and samples the position's number as the token.

    .venv/bin/python examples/embed_scheduler_core.py
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import crosspool
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.models.registry import specs_of
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.protocols import GrammarMatcher, ModelTools
from crosspool.scheduler.request import GenerateRequest, Grammar, StopRules
from crosspool.transport.messages import RowResult, Sampling, Step, StepResult

DEMO = Path(crosspool.__file__).parent / "demo"
NAMES = ("tiny-qwen3-moe", "tiny-deepseek-v2")


class Decoder:
    """Text of tokens, for stop strings; this example has none."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class NoGrammars:
    """A grammar backend that refuses every grammar."""

    def compile(self, grammar: Grammar, output: Sequence[int] = ()) -> Future[GrammarMatcher]:
        future: Future[GrammarMatcher] = Future()
        future.set_exception(ValueError(f"no {grammar.kind} here"))
        return future


def carried_out(step: Step) -> StepResult:
    """Pretend to run a step; a real rank maps chunks, runs the layers and samples."""
    rows = [
        RowResult(request=row.request, token=row.start + len(row.tokens) if row.sample else -1)
        for row in step.rows
    ]
    return StepResult(step=step.step, rows=rows)


def main() -> None:
    now = 0.0
    deployment = Deployment(
        models={n: ModelConfig(name=name, path=str(DEMO / name)) for n, name in enumerate(NAMES)},
        next_model=len(NAMES),
        kv_pool_devices=(Device("cpu:0"),),
        weight_pool_devices=(Device("cpu:0"),),
        kv_pool_bytes=16 << 20,
        weight_pool_bytes=64 << 20,
        loop="host",  # so that steps come one by one, without leases
    )
    tools = {
        number: ModelTools(spec=spec, decoder=Decoder(), grammars=NoGrammars())
        for number, spec in specs_of(deployment.models).items()
    }
    core = SchedulerCore(deployment, tools, clock=lambda: now)
    for number, prompt in enumerate(([1, 2, 3], [4, 5, 6, 7], [8, 9])):
        core.add(
            GenerateRequest(
                rid=f"request {number}",
                model=number % 2,
                input_ids=prompt,
                sampling=Sampling(temperature=0),
                stop=StopRules(max_new_tokens=4, ignore_eos=True),
            )
        )
    unfinished = 3
    while unfinished:
        core.schedule()
        for rank, message in core.drain_messages():
            if not isinstance(message, Step):
                continue  # chunks to unmap, requests that are over
            now += 0.01
            rows = ", ".join(f"{row.start}+{len(row.tokens)}" for row in message.rows)
            print(f"step {message.step} of {NAMES[message.model]}: rows {rows}")
            core.on_result(rank, carried_out(message))
        for output in core.drain_outputs():
            if output.finish is not None:
                unfinished -= 1
                print(f"{output.rid} ({NAMES[output.model]}): tokens {output.token_ids}")


if __name__ == "__main__":
    main()
