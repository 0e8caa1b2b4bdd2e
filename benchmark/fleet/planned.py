"""A fleet against its own plan: the share of requests that find their model resident, wakes, and
the time to the first token.

A trial load teaches how fast models are woken while others answer, and how long requests take of a
resident one. The planner's simulation of the scheduler's rule then gives the interval in which the
figures of a run of this length fall. A load from another seed is served after the trial. The
simulation of exactly what was served tells the chance of arrivals apart from what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from crosspool.config.deployment import ModelConfig
from crosspool.planner.residency import WhatIsFound, what_is_found
from crosspool.scheduler.budgets import Budgets, WeightPlace
from crosspool.simulator.visits import Visit, serve
from rich.progress import Progress

from benchmark import checkpoint
from benchmark.fleet.completions import Completion, Sent, send
from benchmark.fleet.popularity import failures, make_load
from benchmark.fleet.served import Fleet, States, sizes
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total

LEVEL = 0.95
TRIAL_SHARE = 0.5
"""Length of the trial, as a share of that of the run."""
QUANTITIES = {
    "find their model resident": "1",
    "wakes": "1/h",
    "ttft": "s",
    "ttft of a model that is not resident": "s",
}
"""What is compared, and its unit; TTFT in the mean."""
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Learned:
    """What the trial has shown."""

    wake_bytes_per_s: float
    ttft: float
    """Mean seconds to the first token of a request that finds its model resident."""
    service: list[float]
    """Seconds that each of them took in whole."""


@dataclass(frozen=True)
class Result:
    learned: Learned
    planned: dict[str, tuple[float, float]]
    """The interval of each figure over simulated runs."""
    replayed: Figures
    """What the simulation makes of the arrivals that were served."""
    measured: Figures
    requests: int
    failed: dict[str, int]
    usage: Usage

    def is_within(self, name: str) -> bool:
        low, high = self.planned[name]
        return low <= self.measured[name] <= high


def _learned(sent: Sent, states: Sequence[str], waking: tuple[float, float]) -> Learned:
    """``waking``: bytes that were read for wakes, and the seconds that it took."""
    hits = [
        outcome
        for outcome, state in zip(sent.outcomes, states, strict=True)
        if outcome.complete and state == "resident"
    ]
    return Learned(
        wake_bytes_per_s=waking[0] / waking[1],
        ttft=fmean(outcome.ttft for outcome in hits),
        service=[outcome.times[-1] - outcome.request.arrival for outcome in hits],
    )


def figures(found: WhatIsFound, learned: Learned) -> dict[str, float]:
    """Return what a simulated run comes to."""
    values = (
        found.hit_share, found.wakes_per_hour, learned.ttft + found.wait_s,
        learned.ttft + found.missed_wait_s,
    )  # fmt: skip
    return dict(zip(QUANTITIES, values, strict=True))


def measured(sent: Sent, states: Sequence[str], wakes: int, seconds: float) -> dict[str, float]:
    """Return what a served run came to; ``states`` are those of the models when requests came."""
    ttft = [outcome.ttft for outcome in sent.complete]
    missed = [
        outcome.ttft
        for outcome, state in zip(sent.outcomes, states, strict=True)
        if outcome.complete and state != "resident"
    ]
    hits = fmean(state == "resident" for state in states)
    values = (hits, wakes * 3600 / seconds, fmean(ttft), fmean(missed) if missed else 0.0)
    return dict(zip(QUANTITIES, values, strict=True))


def simulated(
    load: Sequence[Completion], names: Sequence[str], room: int, sizes: tuple[int, int],
    learned: Learned, *, after: float, quantum: float, rng: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """Return what the requests that come ``after`` so many seconds find, and those before do not
    count. ``sizes``: bytes of a model's FFN weights and of its attention part."""
    services = rng.choice(learned.service, len(load))
    visits = [
        Visit(request.arrival, names.index(request.model), float(service))
        for request, service in zip(load, services, strict=True)
    ]
    ffn, attention = sizes
    every = range(len(names))
    places = [
        WeightPlace(0, "ffn", room * ffn, dict.fromkeys(every, ffn)),
        WeightPlace(0, "attention", room * attention, dict.fromkeys(every, attention)),
    ]
    found = serve(
        visits,
        Budgets(places),
        {number: ModelConfig(name=name, path="") for number, name in enumerate(names)},
        bytes_per_s=learned.wake_bytes_per_s,
        quantum=quantum,
    )
    skipped = sum(visit.arrival < after for visit in visits)
    return figures(what_is_found(names, visits, found, skipped), learned)


def run(
    *,
    models: int,
    room: int,
    layers: int | None,
    tiny: bool,
    rate: float,
    seconds: float,
    exponent: float,
    runs: int,
    quantum: float = 10.0,
) -> Result:
    folders = checkpoint.models(models, tiny=tiny, layers=layers)
    names = [folder.name for folder in folders]
    trial_seconds = TRIAL_SHARE * seconds
    trial, load = (
        make_load(names, rate, length, exponent, seed)
        for seed, length in ((11, trial_seconds), (21, seconds))
    )
    with Fleet(folders, room, ["--residency-quantum", str(quantum)]) as server:
        server.pack_all()
        for name in names[:room]:
            server.do("wake", name)
        send(server.url, make_load(names[:1], 1.0, 3.0, 1.0, 1), 600.0)
        ffn, attention = sizes(folders[0])
        before = server.models().values()
        states = States(server)
        with states.watched():
            sent = send(server.url, trial, 3600.0)
        after = server.models().values()
        wakes, waking = (
            sum(told[field] for told in after) - sum(told[field] for told in before)
            for field in ("wakes", "waking_seconds")
        )
        learned = _learned(sent, _seen(states, sent), (wakes * (ffn + attention), waking))
        states = States(server)
        with Usage(server) as usage, states.watched():
            sent = send(server.url, load, 3600.0)
        wakes = sum(told["wakes"] for told in server.models().values()) - sum(
            told["wakes"] for told in after
        )
    found = measured(sent, _seen(states, sent), wakes, seconds)
    given: dict[str, Any] = {"after": trial_seconds, "quantum": quantum}
    with Progress(refresh_per_second=2) as progress:
        every = [
            simulated(
                make_load(names, rate, trial_seconds + seconds, exponent, 1000 + number),
                names, room, (ffn, attention), learned, rng=np.random.default_rng(number), **given,
            )
            for number in progress.track(range(runs), description="simulated runs")
        ]  # fmt: skip
    moved = [Completion(r.arrival + trial_seconds, r.model, r.prompt, r.max_tokens) for r in load]
    replayed = simulated(
        [*trial, *moved], names, room, (ffn, attention), learned,
        rng=np.random.default_rng(0), **given,
    )  # fmt: skip
    planned = {
        name: (
            quantile([one[name] for one in every], (1 - LEVEL) / 2),
            quantile([one[name] for one in every], (1 + LEVEL) / 2),
        )
        for name in QUANTITIES
    }
    return Result(learned, planned, replayed, found, len(load), failures(sent.outcomes), usage)


def _seen(states: States, sent: Sent) -> list[str]:
    return [
        states.at(sent.started + outcome.request.arrival, outcome.request.model)
        for outcome in sent.outcomes
    ]


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_planned")
    for name, unit in QUANTITIES.items():
        low, high = result.planned[name]
        recorder.add(
            name, [result.measured[name]], unit, model=model,
            parameters=parameters | {"level": LEVEL}, **total([result.usage]),
            planned_low=low, planned_high=high, replayed=result.replayed[name],
            within=result.is_within(name), requests=result.requests, failed=result.failed,
            wake_bytes_per_s=result.learned.wake_bytes_per_s,
        )  # fmt: skip
    return recorder


def told(result: Result) -> str:
    lines = [
        f"{result.requests} requests, failed: {result.failed or 'none'}; in the trial, models were "
        f"woken at {result.learned.wake_bytes_per_s / 1e9:.2f} GB/s, and a resident one took "
        f"{result.learned.ttft:.3f} s to the first token, {fmean(result.learned.service):.3f} s in "
        "whole"
    ]
    for name, unit in QUANTITIES.items():
        low, high = result.planned[name]
        where = "within" if result.is_within(name) else "OUTSIDE"
        lines.append(
            f"{name}, {unit}: planned {low:.3g} to {high:.3g} ({LEVEL:.0%}), these arrivals "
            f"{result.replayed[name]:.3g}, measured {result.measured[name]:.3g}: {where}"
        )
    return "\n".join(lines)
