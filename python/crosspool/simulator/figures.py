"""Figures of a simulation: percentiles by model, what devices did, and wakes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from crosspool.config.deployment import Deployment
from crosspool.simulator.events import Simulated
from crosspool.simulator.requests import SimulatedRequest

Numbers = npt.NDArray[np.float64]
SHARES = (0.5, 0.9, 0.99)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and percentiles of values, in seconds. A percentile is the least value that is no less
    than this share of them."""

    mean: float
    p50: float
    p90: float
    p99: float


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the requests of one model, or of all. None stands where nothing was answered."""

    requests: int
    refused: dict[str, int]
    """Refused requests by HTTP status."""
    prompt_tokens: int
    output_tokens: int
    ttft: Spread | None
    tbt: Spread | None
    e2e: Spread | None


class SimulationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What ``crosspool simulate --json`` prints."""

    seconds: float
    """Time at which the last request was over."""
    all: ModelFigures
    models: dict[str, ModelFigures]
    utilisation: dict[str, float]
    """Share of the time that each device worked."""
    wakes: int
    """Times that a device read the weights of a model."""
    woken_bytes: int
    steps: int
    turns: int
    """Times that the scheduler was called upon."""
    notes: list[str] = []


def spread(values: Numbers, times: Numbers | None = None) -> Spread | None:
    """Figures of ``values``, each seen as often as ``times`` has it; None where there are none."""
    if not len(values):
        return None
    weights = np.ones(len(values)) if times is None else times
    order = np.argsort(values, kind="stable")
    ascending, seen = values[order], np.cumsum(weights[order])
    places = np.searchsorted(seen, np.array(SHARES) * seen[-1])
    p50, p90, p99 = ascending[np.minimum(places, len(values) - 1)].tolist()
    return Spread(mean=float(values @ weights / seen[-1]), p50=p50, p90=p90, p99=p99)


def simulation_figures(
    deployment: Deployment,
    requests: Sequence[SimulatedRequest],
    found: Simulated,
    notes: Sequence[str] = (),
) -> SimulationFigures:
    places: dict[int, list[int]] = {number: [] for number in deployment.models}
    for place, request in enumerate(requests):
        places[request.model].append(place)
    return SimulationFigures(
        seconds=found.seconds,
        all=_figures(requests, found, range(len(requests)), list(deployment.models)),
        models={
            config.name: _figures(requests, found, places[number], [number])
            for number, config in deployment.models.items()
        },
        utilisation={
            device.name: busy / found.seconds if found.seconds else 0.0
            for device, busy in zip(deployment.devices, found.busy, strict=True)
        },
        wakes=found.wakes,
        woken_bytes=found.woken_bytes,
        steps=found.steps,
        turns=found.turns,
        notes=list(notes),
    )


def times_of(
    requests: Sequence[SimulatedRequest], found: Simulated, places: Sequence[int]
) -> tuple[Numbers, Numbers]:
    """TTFT and E2E of those of the requests at ``places`` that were answered, in seconds."""
    answered = [place for place in places if found.outcomes[place].status == 200]
    pairs = [(found.outcomes[place], requests[place].arrival) for place in answered]
    return (
        np.array([outcome.first - arrival for outcome, arrival in pairs]),
        np.array([outcome.end - arrival for outcome, arrival in pairs]),
    )


def gaps_of(found: Simulated, models: Sequence[int]) -> tuple[Numbers, Numbers]:
    """Times between tokens of these models, and how often each was seen."""
    gaps = [found.gaps[model] for model in models]
    seconds = [np.frombuffer(each.seconds, dtype=np.float64) for each in gaps if each.seconds]
    times = [np.frombuffer(each.times, dtype=np.int64) for each in gaps if each.seconds]
    if not seconds:
        return np.zeros(0), np.zeros(0)
    return np.concatenate(seconds), np.concatenate(times).astype(np.float64)


def _figures(
    requests: Sequence[SimulatedRequest],
    found: Simulated,
    places: Sequence[int],
    models: Sequence[int],
) -> ModelFigures:
    refused: dict[str, int] = {}
    for place in places:
        status = found.outcomes[place].status
        if status != 200:
            refused[str(status)] = refused.get(str(status), 0) + 1
    ttft, e2e = times_of(requests, found, places)
    return ModelFigures(
        requests=len(places),
        refused=refused,
        prompt_tokens=sum(requests[place].prompt for place in places),
        output_tokens=sum(found.outcomes[place].tokens for place in places),
        ttft=spread(ttft),
        tbt=spread(*gaps_of(found, models)),
        e2e=spread(e2e),
    )
