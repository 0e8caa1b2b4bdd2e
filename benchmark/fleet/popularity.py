"""Requests for more models than fit, of which some are more popular: time to the first token by the
model's state; and the same requests to llama.cpp's server, which swaps models on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmark import checkpoint
from benchmark.fleet.completions import Completion, Outcome, Sent, send
from benchmark.fleet.llama_server import LlamaServer
from benchmark.fleet.served import Fleet, States, cores
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import poisson

LIMIT = 0.3
"""Highest good ratio of the mean TTFT to llama.cpp's."""
_PROMPT, _OUTPUT = 64, 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz ,."


@dataclass
class Result:
    ours: Sent
    states: list[str]
    """State of its model when each of our requests came."""
    wakes: int
    longest_wake: float
    usage: Usage
    theirs: Sent | None = None
    """What llama.cpp's server made of the same requests; None where it was not asked."""

    def ttft(self, state: str | None = None) -> list[float]:
        """Return the seconds to the first token of complete outputs, of one state or of all."""
        return [
            outcome.ttft
            for outcome, seen in zip(self.ours.outcomes, self.states, strict=True)
            if outcome.complete and state in (None, seen)
        ]

    @property
    def ratio(self) -> float | None:
        """Our mean TTFT over theirs, of the requests that both answered."""
        if self.theirs is None:
            return None
        pairs = zip(self.ours.outcomes, self.theirs.outcomes, strict=True)
        both = [(a.ttft, b.ttft) for a, b in pairs if a.complete and b.complete]
        return fmean(a for a, _ in both) / fmean(b for _, b in both)


def zipf(models: int, exponent: float) -> list[float]:
    """Return the share of requests of each model, the most popular first."""
    weights = [rank**-exponent for rank in range(1, models + 1)]
    return [weight / sum(weights) for weight in weights]


def make_load(
    names: Sequence[str], rate: float, seconds: float, exponent: float, seed: int
) -> list[Completion]:
    """Draw requests for ``names``, ``rate`` per second of all of them together."""
    rng = np.random.default_rng(seed)
    shares = zipf(len(names), exponent)
    load = []
    for arrival in poisson(rate, seconds, rng):
        name = names[int(rng.choice(len(names), p=shares))]
        prompt = "".join(rng.choice(list(_LETTERS), _PROMPT))
        load.append(Completion(float(arrival), name, prompt, _OUTPUT))
    return load


def run(
    *,
    models: int,
    room: int,
    layers: int | None,
    tiny: bool,
    rate: float,
    seconds: float,
    exponent: float,
    with_llama: bool,
) -> Result:
    folders = checkpoint.models(models, tiny=tiny, layers=layers)
    names = [folder.name for folder in folders]
    load = make_load(names, rate, seconds, exponent, 0)
    result = _ours(folders, room, load)
    if with_llama:
        with LlamaServer(folders, cores()) as server:
            send(server.url, make_load(names[:1], 1.0, 3.0, 1.0, 1), 600.0)
            result.theirs = send(server.url, load, 3600.0)
    return result


def _ours(folders: Sequence[Path], room: int, load: Sequence[Completion]) -> Result:
    with Fleet(folders, room) as server:
        server.pack_all()
        for name in server.names[:room]:
            server.do("wake", name)
        send(server.url, make_load(server.names[:1], 1.0, 3.0, 1.0, 1), 600.0)
        before = sum(told["wakes"] for told in server.models().values())
        states = States(server)
        with Usage(server) as usage, states.watched():
            sent = send(server.url, load, 3600.0)
        after = server.models().values()
        return Result(
            sent,
            [states.at(sent.started + request.arrival, request.model) for request in load],
            sum(told["wakes"] for told in after) - before,
            max(told["last_wake_seconds"] or 0.0 for told in after),
            usage,
        )


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Count the requests that were not answered in full, by status and reason."""
    found: dict[str, int] = {}
    for outcome in outcomes:
        if not outcome.complete:
            why = f"{outcome.status} {outcome.error[:120]}"
            found[why] = found.get(why, 0) + 1
    return found


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_popularity")
    both: dict[str, Any] = {"model": model, "parameters": parameters, **total([result.usage])}
    for state in sorted(set(result.states)):
        recorder.add(f"ttft {state}", result.ttft(state), "s", **both)
    tbt = [gap for outcome in result.ours.complete for gap in outcome.tbt]
    recorder.add("tbt", tbt, "s", **both)
    recorder.add(
        "ttft", result.ttft(), "s", **both, mean=fmean(result.ttft()), wakes=result.wakes,
        failed=failures(result.ours.outcomes), ratio_to="llama.cpp", ratio=result.ratio,
        limit=LIMIT,
    )  # fmt: skip
    if result.theirs is not None:
        theirs = [outcome.ttft for outcome in result.theirs.complete]
        gaps = [gap for outcome in result.theirs.complete for gap in outcome.tbt]
        failed = failures(result.theirs.outcomes)
        recorder.add("ttft of llama.cpp", theirs, "s", **both, mean=fmean(theirs), failed=failed)
        recorder.add("tbt of llama.cpp", gaps, "s", **both)
    return recorder


def told(result: Result) -> str:
    lines = [
        f"{len(result.ours.complete)} of {len(result.ours.outcomes)} requests answered; "
        f"{result.wakes} wakes; failed: {failures(result.ours.outcomes) or 'none'}"
    ]
    for state in sorted(set(result.states)):
        ttft = result.ttft(state)
        if ttft:
            lines.append(
                f"TTFT, {state} ({len(ttft)}): P50 {quantile(ttft, 0.5):.3f} s, P99 "
                f"{quantile(ttft, 0.99):.3f} s"
            )
    if result.theirs is not None:
        theirs = [outcome.ttft for outcome in result.theirs.complete]
        gaps, own = (
            [gap for outcome in sent.complete for gap in outcome.tbt]
            for sent in (result.theirs, result.ours)
        )
        failed = failures(result.theirs.outcomes) or "none"
        lines.append(
            f"llama.cpp: {len(theirs)} answered, failed {failed}; TTFT mean "
            f"{fmean(theirs):.2f} s, ours {fmean(result.ttft()):.2f} s, ratio {result.ratio:.2f} "
            f"(<= {LIMIT}); TBT P50 {1e3 * quantile(gaps, 0.5):.1f} ms, ours "
            f"{1e3 * quantile(own, 0.5):.1f} ms"
        )
    return "\n".join(lines)
