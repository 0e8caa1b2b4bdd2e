"""What requests wait for where the weight pool holds fewer models than there are: the scheduler's
own residency over the traffic's arrivals."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from crosspool.config.deployment import ModelConfig
from crosspool.planner.request import PlanRequest
from crosspool.planner.traffic.samples import ModelTraffic, Traffic
from crosspool.scheduler.budgets import Budgets, WeightPlace
from crosspool.simulator.visits import Visit, Visits, serve

_REQUESTS = 20_000
"""Requests that are simulated where the traffic has rates and no arrival times."""
_WARM_UP = 0.1
"""Share of them that comes before any is counted, as at the start nobody knows who is popular."""
_MOST_REQUESTS = 100_000
"""Requests of a trace that are simulated at most, the first ones."""


class ModelIsFound(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of one model find."""

    name: str
    hit_share: float | None
    """Share of the requests that find the model resident; None where none came."""
    wakes_per_hour: float
    wait_s: float | None
    """Mean time by which a request waits longer for its first token than if the model were always
    resident, in seconds; None where none came."""


class WhatIsFound(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of all models find."""

    requests: int
    """Number of simulated requests that count."""
    seconds: float
    """Time in which they come."""
    hit_share: float
    """Share of the requests that find their model resident."""
    wakes_per_hour: float
    wait_s: float
    """Mean time by which a request waits longer for its first token than if all models were always
    resident, in seconds."""
    wait_p99_s: float
    """The 99th percentile of that time."""
    missed_wait_s: float
    """Mean of that time over the requests that do not find their model resident; 0 if all do."""
    models: tuple[ModelIsFound, ...]


class ResidencyPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A weight pool that holds fewer models than there are."""

    weight_pool_bytes: int
    wake_bytes_per_s: float
    """Bytes per second at which a device reads the weights of a model that is woken."""
    found: WhatIsFound


def residency_plan(
    request: PlanRequest, kv_devices: int, weight_devices: int, *, shared: bool
) -> ResidencyPlan | None:
    """Simulates the residency; None where the weight pool holds all models. ``shared``: whether
    both pools are on one device."""
    if not request.models_sleep:
        return None
    pool = request.pooled_ffn_bytes
    shapes = [model.shape for model in request.models]
    first = 0 if shared else kv_devices
    attention = {number: shape.attention_bytes for number, shape in enumerate(shapes)}
    ffn = {number: shape.ffn_bytes // weight_devices for number, shape in enumerate(shapes)}
    places = [
        WeightPlace(device=first + n, role="ffn", budget=pool // weight_devices, held=ffn)
        for n in range(weight_devices)
    ] + [
        WeightPlace(device=n, role="attention", budget=None, held=attention)
        for n in range(kv_devices)
    ]
    names = [model.name for model in request.models]
    visits, skipped = visits_of(request.traffic, np.random.default_rng(request.seed))
    found = serve(
        visits,
        Budgets(places),
        {number: ModelConfig(name=name, path="") for number, name in enumerate(names)},
        bytes_per_s=request.wake_bytes_per_s,
        quantum=request.residency_quantum,
    )
    return ResidencyPlan(
        weight_pool_bytes=pool,
        wake_bytes_per_s=request.wake_bytes_per_s,
        found=what_is_found(names, visits, found, skipped),
    )


def visits_of(traffic: Traffic, rng: np.random.Generator) -> tuple[list[Visit], int]:
    """Returns requests in the order in which they come, and the number of them that are the
    warm-up."""
    timed = all(model.arrivals is not None for model in traffic.models)
    seconds = traffic.seconds if timed else _REQUESTS / sum(m.rate for m in traffic.models)
    visits = [
        Visit(float(arrival), number, float(service))
        for number, model in enumerate(traffic.models)
        for arrival, service in zip(*_drawn(model, seconds, rng), strict=True)
    ]
    visits.sort(key=lambda visit: visit.arrival)
    if timed:
        return visits[:_MOST_REQUESTS], 0
    return visits, int(_WARM_UP * len(visits))


def _drawn(
    model: ModelTraffic, seconds: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals and service times of one model's requests."""
    if model.arrivals is not None:
        return model.arrivals, model.samples.service
    if model.rate == 0:
        return np.empty(0), np.empty(0)
    arrivals = rng.uniform(0.0, seconds, rng.poisson(model.rate * seconds))
    return arrivals, rng.choice(model.samples.service, len(arrivals))


def what_is_found(
    names: Sequence[str], visits: Sequence[Visit], served: Visits, skipped: int
) -> WhatIsFound:
    """Sums up all visits but the first ``skipped``, of models of these ``names``."""
    counted, outcomes = visits[skipped:], served.outcomes[skipped:]
    begin = counted[0].arrival if skipped else 0.0
    seconds = max(counted[-1].arrival - begin, 1e-9)
    model = np.array([visit.model for visit in counted])
    hit = np.array([outcome.is_hit for outcome in outcomes])
    wait = np.array([outcome.wait for outcome in outcomes])
    woken = np.array([number for when, number in served.wakes if when >= begin], dtype=np.int64)
    per_hour = 3600 / seconds
    return WhatIsFound(
        requests=len(counted),
        seconds=seconds,
        hit_share=float(hit.mean()),
        wakes_per_hour=len(woken) * per_hour,
        wait_s=float(wait.mean()),
        wait_p99_s=float(np.quantile(wait, 0.99)),
        missed_wait_s=_mean(wait[~hit]) or 0.0,
        models=tuple(
            ModelIsFound(
                name=name,
                hit_share=_mean(hit[model == number]),
                wakes_per_hour=float((woken == number).sum()) * per_hour,
                wait_s=_mean(wait[model == number]),
            )
            for number, name in enumerate(names)
        ),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
