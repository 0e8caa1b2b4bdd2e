"""Measures a shared system prompt on three models, with and without the prefix cache.

    python -m benchmark.prefix_cache [--quick]

Every request of a model begins with that model's long system prompt and ends with a question of its
own, as requests of a chat service do. Outputs are greedy and in float32. Two servers, one of them
with ``--disable-radix-cache``, get the same requests at the same times, in turns. The benchmark
measures the share of prompt tokens that come from the cache, TTFT, and whether every output has the
same tokens.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from benchmark import plots
from benchmark.client import STREAM_FLAGS, Answer, Replay, replay
from benchmark.records import IMAGES, Recorder
from benchmark.server import DEMO, TINY_MODELS, Server
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, poisson

CACHE = {"with": (), "without": ("--disable-radix-cache",)}
PAGE_SIZE = 16
FLAGS = (
    *("--dtype", "float32", "--kv-pool-bytes", "64MiB", "--context-length", "2048"),
    *("--page-size", str(PAGE_SIZE), *STREAM_FLAGS),
)
SYSTEM_TOKENS = 1024
QUESTION_TOKENS = (16, 64)
ANSWER_TOKENS = 16
RATE = 2.5
"""Requests per second of all models: few enough that TTFT has no queueing time."""


@dataclass(frozen=True)
class Plan:
    rounds: int = 3
    seconds: float = 24.0


QUICK = Plan(rounds=1, seconds=5.0)


@dataclass(frozen=True)
class Round:
    """One replay on one server."""

    cache: str
    replay: Replay
    usage: Usage


def texts() -> tuple[str, list[str]]:
    """Return a long text and many sentences, from the documentation that comes with Python."""
    whole = re.sub(r"\s+", " ", " ".join(topics.topics[name] for name in sorted(topics.topics)))
    return whole, [s for s in re.split(r"(?<=\.) ", whole) if 40 < len(s) < 300]


class Prompts:
    """Prompts of one model: its system prompt followed by a question."""

    def __init__(self, model: str, index: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(str(DEMO / model))
        whole, sentences = texts()
        part = whole[index * 6_000 : (index + 1) * 6_000]  # each model has its own
        self.system: list[int] = tokenizer.encode(part)[:SYSTEM_TOKENS]
        self._questions = [tokenizer.encode(s, add_special_tokens=False) for s in sentences[:400]]

    def draw(self, rng: np.random.Generator) -> list[int]:
        question = self._questions[int(rng.integers(len(self._questions)))]
        return [*self.system, *question[: int(rng.integers(*QUESTION_TOKENS))]]


def make_load(prompts: Sequence[Prompts], seconds: float, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    load = []
    for arrival in poisson(RATE, seconds, rng):
        index = int(rng.integers(len(TINY_MODELS)))
        prompt = prompts[index].draw(rng)
        load.append(Request(float(arrival), TINY_MODELS[index], prompt, ANSWER_TOKENS))
    return load


def reusable_share(load: Sequence[Request]) -> float:
    """Return the share of a load's prompt tokens that a cache of whole pages could provide if it
    had every earlier prompt of the model. At least one token is always computed."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    reusable = 0
    for request in load:
        pages = seen.setdefault(request.model, set())
        prompt = request.prompt
        heads = [tuple(prompt[:n]) for n in range(PAGE_SIZE, len(prompt) + 1, PAGE_SIZE)]
        known = sum(head in pages for head in heads)
        reusable += min(known * PAGE_SIZE, (len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE)
        pages.update(heads)
    return reusable / sum(len(request.prompt) for request in load)


def run(plan: Plan, console: Console) -> list[Round]:
    rounds = []
    with Progress(console=console, refresh_per_second=2) as progress, ExitStack() as stack:
        task = progress.add_task("starting", total=plan.rounds * len(CACHE))
        prompts = [Prompts(model, index) for index, model in enumerate(TINY_MODELS)]
        servers = {
            cache: stack.enter_context(Server([*FLAGS, *flags])) for cache, flags in CACHE.items()
        }
        for server in servers.values():
            warm = [Request(0.0, r.model, r.prompt[::-1], 4) for r in make_load(prompts, 4.0, 999)]
            replay(server.url, warm)
        for number in range(plan.rounds):
            load = make_load(prompts, plan.seconds, number)
            for cache, server in list(servers.items())[:: -1 if number % 2 else 1]:
                progress.update(task, description=f"round {number + 1}, {cache} cache")
                if cache == "with":  # every round begins with an empty cache
                    status, answer = server.manage("/flush_cache")
                    assert status == 200, answer
                with Usage(server) as usage:
                    replayed = replay(server.url, load)
                rounds.append(Round(cache, replayed, usage))
                progress.advance(task)
    return rounds


@dataclass(frozen=True)
class Row:
    """All rounds of one model on one server."""

    cache: str
    model: str
    ttft: list[float]
    prompt_tokens: int
    cached_tokens: int
    failures: list[str]

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


def row(rounds: Sequence[Round], cache: str, model: str) -> Row:
    answers = [
        answer
        for one in rounds
        if one.cache == cache
        for answer in one.replay.answers
        if model in ("all", answer.request.model)
    ]
    complete = [answer for answer in answers if answer.complete]
    return Row(
        cache,
        model,
        ttft=[answer.ttft for answer in complete],
        prompt_tokens=sum(answer.prompt_tokens for answer in complete),
        cached_tokens=sum(answer.cached_tokens for answer in complete),
        failures=[a.error or str(a.status) for a in answers if not a.complete],
    )


def different(rounds: Sequence[Round]) -> list[tuple[Answer, Answer]]:
    """Return outcomes of the same request whose tokens differ."""
    with_, without = (
        [a for one in rounds if one.cache == cache for a in one.replay.answers] for cache in CACHE
    )
    return [(a, b) for a, b in zip(with_, without, strict=True) if a.tokens != b.tokens]


def record(rows: Sequence[Row], rounds: Sequence[Round], plan: Plan, possible: float) -> Recorder:
    recorder = Recorder("prefix_cache")
    differing = len(different(rounds))
    for r in rows:
        own = [one for one in rounds if one.cache == r.cache]
        parameters: dict[str, Any] = {
            "cache": r.cache == "with",
            "system_tokens": SYSTEM_TOKENS,
            "question_tokens": QUESTION_TOKENS,
            "answer_tokens": ANSWER_TOKENS,
            "page_size": PAGE_SIZE,
            "requests_per_s": RATE,
            "rounds": plan.rounds,
            "seconds": plan.seconds,
        }
        recorder.add(
            "ttft",
            r.ttft,
            "s",
            model=r.model,
            parameters=parameters,
            **total([one.usage for one in own]),
            hit_rate=r.hit_rate,
            reusable_share=possible,
            prompt_tokens=r.prompt_tokens,
            cached_tokens=r.cached_tokens,
            answers_that_differ=differing,
            failed=len(r.failures),
        )
    return recorder


def table(rows: Sequence[Row], rounds: Sequence[Round]) -> Table:
    made = Table(title="A shared system prompt on three models", title_justify="left")
    made.add_column("model")
    made.add_column("prefix cache")
    for title in (
        "hit rate",
        "TTFT P50 ms",
        "TTFT P99 ms",
        "requests",
        "server CPU s",
        "others' CPU",
    ):
        made.add_column(title, justify="right")
    for r in rows:
        usages = [one.usage for one in rounds if one.cache == r.cache]
        made.add_row(
            r.model,
            r.cache,
            f"{r.hit_rate:.1%}",
            f"{1e3 * quantile(r.ttft, 0.5):.1f}",
            f"{1e3 * quantile(r.ttft, 0.99):.1f}",
            f"{len(r.ttft)}",
            *(
                (
                    f"{sum(usage.server_cpu_s for usage in usages):.1f}",
                    f"{total(usages)['other_cpu_share']:.0%}",
                )
                if r.model == "all"
                else ()
            ),
        )
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    figure, (hits, ttft) = plots.panels(
        ("Prompt tokens from the cache, %", "TTFT with (dark) and without the cache, ms: P50, P99")
    )
    models = [r.model for r in rows if r.cache == "with" and r.model != "all"]
    places = np.arange(len(models))
    rate = {(r.model, r.cache): r for r in rows}
    hits.bar(places, [100 * rate[m, "with"].hit_rate for m in models], 0.5, color=plots.COLORS[0])
    hits.set_ylim(0, 100)
    for offset, cache, color in ((-0.2, "with", plots.COLORS[0]), (0.2, "without", "#9cc3e2")):
        for q, alpha in ((0.99, 0.45), (0.5, 1.0)):
            values = [1e3 * quantile(rate[m, cache].ttft, q) for m in models]
            ttft.bar(places + offset, values, 0.36, color=color, alpha=alpha)
    for axis in (hits, ttft):
        axis.set_xticks(places, [m.removeprefix("tiny-") for m in models], fontsize=8)
    plots.save(figure, path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.prefix_cache", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="takes seconds and records nothing")
    given = parser.parse_args(words)
    plan = QUICK if given.quick else Plan()
    console = Console(width=max(Console().width, 110))
    began = time.monotonic()
    rounds = run(plan, console)
    rows = [row(rounds, cache, model) for model in (*TINY_MODELS, "all") for cache in CACHE]
    loads = [[a.request for a in one.replay.answers] for one in rounds if one.cache == "with"]
    possible = float(np.mean([reusable_share(load) for load in loads]))
    if not given.quick:
        console.print(f"rows: {record(rows, rounds, plan, possible).write()}")
        plot(rows, IMAGES / "prefix_cache.svg")
    console.print(table(rows, rounds))
    failures = [failure for r in rows[-2:] for failure in r.failures]
    differing = different(rounds)
    total = len(rows[-1].ttft)
    console.print(
        f"{possible:.1%} of all prompt tokens could come from a cache of whole pages; "
        f"{total - len(differing)} of {total} outputs have the same tokens with and without it; "
        f"{len(failures)} failed; {time.monotonic() - began:.0f} s"
    )
    for failure in failures[:5]:
        console.print(f"failed: {failure}", markup=False)
    return 1 if failures or differing else 0


if __name__ == "__main__":
    sys.exit(main())
