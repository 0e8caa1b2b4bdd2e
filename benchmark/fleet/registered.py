"""A server of one model, and one that has many more that only sleep: seconds to its start, memory,
and what a token of the one model takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmark import checkpoint
from benchmark.client import replay
from benchmark.fleet.cycles import MOST_REGISTERED, Holding, holding
from benchmark.fleet.served import Fleet
from benchmark.records import Recorder
from benchmark.server import DEMO
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, random_prompt

LIMIT = 1.02
"""Highest good ratio of the time between tokens with the others to the one without."""
ALONE, AMONG = "one model", "among others"
SERVERS = (ALONE, AMONG)
_TINY = DEMO / "tiny-qwen3-moe"
_BATCH, _PROMPT, _OUTPUT, _VOCAB = 4, 64, 256, 512


@dataclass
class Result:
    registered: int
    """Models that only sleep, of one of the servers."""
    start_seconds: dict[str, float] = field(default_factory=dict)
    holdings: dict[str, Holding] = field(default_factory=dict)
    """What each server holds before its first request."""
    per_token: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SERVERS})
    """Seconds from token to token, mean of each turn. Under a lease, tokens come several at a time,
    so that the gaps between pieces tell nothing."""
    usages: list[Usage] = field(default_factory=list)

    @property
    def bytes_per_model(self) -> float:
        """Return the bytes that a model which sleeps takes of all processes together."""
        more = self.holdings[AMONG].memory - self.holdings[ALONE].memory
        return more / self.registered

    @property
    def seconds_per_model(self) -> float:
        """Return the seconds by which such a model makes the start longer."""
        return (self.start_seconds[AMONG] - self.start_seconds[ALONE]) / self.registered

    @property
    def ratios(self) -> list[float]:
        """Return, of each turn, the ratio of the seconds from token to token."""
        pairs = zip(self.per_token[AMONG], self.per_token[ALONE], strict=True)
        return [among / alone for among, alone in pairs]


@contextmanager
def _started(folder: Path, registered: int) -> Iterator[tuple[Fleet, float]]:
    """Serve the model in ``folder``, and tiny ones that sleep; yield the server and the seconds
    until it took requests."""
    flags = ["--keep", "demand"]
    for number in range(registered):
        flags += ["--model-path", str(_TINY), "--served-model-name", f"registered-{number}"]
        flags += ["--keep", "asleep"]
    began = time.perf_counter()
    with Fleet([folder], 2, flags) as server:
        yield server, time.perf_counter() - began


def _turn(server: Fleet, name: str, seed: int) -> float:
    """Have a batch of requests answered; return the mean seconds from token to token."""
    rng = np.random.default_rng(seed)
    prompts = [random_prompt(_PROMPT, _VOCAB, rng) for _ in range(_BATCH)]
    sent = replay(server.url, [Request(0.0, name, prompt, _OUTPUT) for prompt in prompts])
    for answer in sent.answers:
        if not answer.complete:
            raise RuntimeError(answer.error or f"status {answer.status}")
    spans = [answer.pieces[-1][0] - answer.pieces[0][0] for answer in sent.answers]
    return fmean(spans) / (_OUTPUT - 1)


def run(*, layers: int | None, tiny: bool, registered: int, rounds: int) -> Result:
    """Start one server after the other, then have them answer the same in turns."""
    (folder,) = checkpoint.models(1, tiny=tiny, layers=layers)
    result = Result(registered)
    servers: dict[str, Fleet] = {}
    with ExitStack() as stack, Progress(refresh_per_second=2) as progress:
        task = progress.add_task("starting", total=rounds + len(SERVERS))
        with _started(folder, 0):
            pass  # so that files are in the page cache
        for case, others in zip(SERVERS, (0, registered), strict=True):
            server, result.start_seconds[case] = stack.enter_context(_started(folder, others))
            result.holdings[case] = holding(server)
            servers[case] = server
            _turn(server, folder.name, seed=rounds)
            progress.advance(task)
        for turn in range(rounds):
            progress.update(task, description=f"turn {turn + 1}", advance=1)
            for case in SERVERS[:: -1 if turn % 2 else 1]:
                with Usage(servers[case]) as usage:
                    result.per_token[case].append(_turn(servers[case], folder.name, seed=turn))
                result.usages.append(usage)
    return result


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_registered")
    parameters = parameters | {"batch": _BATCH, "prompt": _PROMPT, "output": _OUTPUT}
    used = total(result.usages)
    for case in SERVERS:
        recorder.add(
            f"start, {case}", [result.start_seconds[case]], "s", model=model,
            parameters=parameters, **used,
        )  # fmt: skip
    recorder.add(
        "memory per registered model", [result.bytes_per_model], "B", model=_TINY.name,
        parameters=parameters, limit=MOST_REGISTERED, **used,
    )  # fmt: skip
    recorder.add(
        "seconds per token among others", result.ratios, "of those alone", model=model,
        parameters=parameters, limit=LIMIT, **used,
        s={case: quantile(result.per_token[case], 0.5) for case in SERVERS},
    )  # fmt: skip
    return recorder


def told(result: Result) -> str:
    start = result.start_seconds
    among, alone = (1e3 * quantile(result.per_token[case], 0.5) for case in (AMONG, ALONE))
    return (
        f"{result.registered} registered models: start after {start[AMONG]:.1f} s, with one model "
        f"after {start[ALONE]:.1f} s, {1e3 * result.seconds_per_model:.0f} ms for each; "
        f"{result.bytes_per_model / (1 << 20):.1f} MiB each (< {MOST_REGISTERED >> 20}); a token "
        f"of the resident one takes {among:.3f} ms, alone {alone:.3f} ms, ratio in pairs "
        f"{quantile(result.ratios, 0.5):.3f} (<= {LIMIT})"
    )
