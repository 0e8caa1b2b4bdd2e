"""Two models that do not fit together, asked all the time: tokens/s of each against half of what
it makes alone, and how long its requests wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmark import checkpoint
from benchmark.client import Answer, replay
from benchmark.fleet.served import Fleet
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, random_prompt

CLIENTS = 4
"""Clients of each model; each sends its next request when the last one is answered."""
_PROMPT, _OUTPUT, _VOCAB = 64, 64, 512


@dataclass
class Result:
    alone: dict[str, float] = field(default_factory=dict)
    """Tokens/s of each model while the other has no requests."""
    together: dict[str, float] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)
    """Seconds to the first token, and between two tokens, while both are asked."""
    failed: list[str] = field(default_factory=list)
    changes: int = 0
    """Wakes while both were asked."""
    usages: list[Usage] = field(default_factory=list)

    def share(self, name: str) -> float:
        """Return the model's tokens/s over half of those that it makes alone."""
        return self.together[name] / (self.alone[name] / 2)


def _ask(server: Fleet, name: str, seconds: float, seed: int) -> list[tuple[float, Answer]]:
    """Send one request after the other for ``seconds``; return the answers and their starts."""
    rng, found = np.random.default_rng(seed), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        request = Request(0.0, name, random_prompt(_PROMPT, _VOCAB, rng), _OUTPUT)
        sent = replay(server.url, [request])
        found.append((sent.started, sent.answers[0]))
    return found


def _all(
    server: Fleet, names: Sequence[str], seconds: float
) -> dict[str, list[tuple[float, Answer]]]:
    answers: dict[str, list[tuple[float, Answer]]] = {name: [] for name in names}

    def client(name: str, seed: int) -> None:
        answers[name] += _ask(server, name, seconds, seed)

    threads = [
        threading.Thread(target=client, args=(name, 100 * index + seed), daemon=True)
        for index, name in enumerate(names)
        for seed in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _rate(answers: Sequence[tuple[float, Answer]], seconds: float) -> float:
    """Tokens/s within the first ``seconds`` of the first request's start."""
    begin = min(start for start, _ in answers)
    times = [start + when for start, answer in answers for when, _ in answer.pieces]
    return sum(when - begin <= seconds for when in times) / seconds


def run(*, layers: int | None, tiny: bool, seconds: float, quantum: float) -> Result:
    folders = checkpoint.models(2, tiny=tiny, layers=layers)
    result = Result()
    with Fleet(folders, 1, ["--residency-quantum", str(quantum)]) as server:
        server.pack_all()
        for name in server.names:
            server.do("wake", name)
            _all(server, [name], 2.0)
            with Usage(server) as usage:
                answers = _all(server, [name], seconds)
            result.usages.append(usage)
            result.alone[name] = _rate(answers[name], seconds)
        before = sum(told["wakes"] for told in server.models().values())
        with Usage(server) as usage:
            answers = _all(server, server.names, 2 * seconds)
        result.usages.append(usage)
        result.changes = sum(told["wakes"] for told in server.models().values()) - before
        for name, found in answers.items():
            result.together[name] = _rate(found, 2 * seconds)
            complete = [answer for _, answer in found if answer.complete]
            result.failed += [a.error or str(a.status) for _, a in found if not a.complete]
            result.waits[name] = [w for a in complete for w in (a.ttft, *a.tbt)]
    return result


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_turns")
    for name, waits in result.waits.items():
        recorder.add(
            "longest pauses", waits, "s", model=name, parameters={"shape": model, **parameters},
            alone=result.alone[name], together=result.together[name], ratio=result.share(name),
            longest=max(waits), failed=len(result.failed), changes=result.changes,
            **total(result.usages),
        )  # fmt: skip
    return recorder


def told(result: Result) -> str:
    lines = [
        f"{name}: {result.alone[name]:.1f} tokens/s alone, {result.together[name]:.1f} by turns, "
        f"{result.share(name):.0%} of half; longest pause {max(result.waits[name]):.1f} s, P99 "
        f"{quantile(result.waits[name], 0.99):.2f} s"
        for name in result.alone
    ]
    return "\n".join([*lines, f"{result.changes} wakes, {len(result.failed)} failed"])
