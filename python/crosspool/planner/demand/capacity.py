"""The traffic that some KV memory sustains: the factor by which all rates can grow until the
quantile of demand reaches the memory's size.

Demand has the stationary law of Poisson arrivals (compound.py), without sampling, so that bisection
converges. For memory so large that the law has very many values, the quantile is computed from the
first three moments (Cornish and Fisher, Revue de l'Institut International de Statistique 5, 1938):
demand is then a sum of thousands of requests and nearly normal. Only memory is considered, not the
speed of attention and FFN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from crosspool.planner.demand.compound import compound_poisson, convolution, request_law
from crosspool.planner.demand.kv_model import Charge, KVLoad, KVModel, kv_loads
from crosspool.planner.traffic.samples import Floats, Traffic

TOLERANCE = 0.005
"""Relative precision of the factor."""
MOST = 1e4
"""Largest factor that is searched for."""
_EXACT_CHUNKS = 50_000
"""Size of memory in chunks up to which the law itself is computed."""


def sustained(
    traffic: Traffic,
    kv_models: Sequence[KVModel],
    limit_bytes: int,
    quantile: float,
    *,
    chunk_bytes: int,
    charge: Charge = "active",
) -> float:
    """Returns the greatest factor on all rates with which the pool's demand stays within
    ``limit_bytes`` for ``quantile`` of the time: 0 when there is none, at most ``MOST``."""
    if limit_bytes < chunk_bytes or not any(model.rate > 0 for model in traffic.models):
        return 0.0 if limit_bytes < chunk_bytes else MOST
    parts = [
        _Part(load, request_law(load, charge))
        for load in kv_loads(traffic, kv_models, chunk_bytes)
        if load.active
    ]
    is_small = limit_bytes <= _EXACT_CHUNKS * chunk_bytes
    demand = (_exact if is_small else _near_normal)(parts, quantile, chunk_bytes)
    if demand(1.0) <= limit_bytes:
        low, high = 1.0, 2.0
        while demand(high) <= limit_bytes:
            low, high = high, high * 2
            if low >= MOST:
                return MOST
    else:
        low, high = 0.5, 1.0
        while demand(low) > limit_bytes:
            low, high = low / 2, low
            if low < 1 / MOST:
                return 0.0
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if demand(middle) <= limit_bytes else (low, middle)
    return low


def some(traffic: Traffic, models: Sequence[int]) -> Traffic:
    """Returns the traffic of some of the models."""
    return Traffic(tuple(traffic.models[model] for model in models), traffic.seconds)


def too_long(traffic: Traffic, longest: Sequence[int]) -> float:
    """Returns the share of all requests, by rate, that have more tokens of prompt and output than
    ``longest`` allows for their model."""
    total = sum(model.rate for model in traffic.models)
    beyond = sum(
        model.rate * float((model.samples.prompt + model.samples.output > most).mean())
        for model, most in zip(traffic.models, longest, strict=True)
        if model.rate > 0
    )
    return beyond / total if total else 0.0


@dataclass(frozen=True)
class _Part:
    """One model's traffic, and the law of a request's pages."""

    load: KVLoad
    law: Floats


def _exact(parts: Sequence[_Part], quantile: float, chunk_bytes: int) -> Callable[[float], float]:
    """Returns the quantile of demand in bytes as a function of the factor on all rates."""

    def chunks(part: _Part, factor: float) -> Floats:
        pages = compound_poisson(factor * part.load.active, part.law)
        held = part.load.layout.chunks_for(np.arange(len(pages), dtype=np.int64))
        return np.bincount(held, weights=pages).astype(np.float64)

    def demand(factor: float) -> float:
        pool = convolution([chunks(part, factor) for part in parts])
        return float(np.searchsorted(np.cumsum(pool), quantile)) * chunk_bytes

    return demand


def _near_normal(
    parts: Sequence[_Part], quantile: float, chunk_bytes: int
) -> Callable[[float], float]:
    """Returns the same function from moments; the last chunk of a model is half full on average."""
    # the cumulants of a compound Poisson sum are the mean number of requests x their moments
    first = second = third = 0.0
    for part in parts:
        sizes = np.arange(len(part.law)) * float(part.load.kv.page_bytes)
        first += part.load.active * float(part.law @ sizes)
        second += part.load.active * float(part.law @ sizes**2)
        third += part.load.active * float(part.law @ sizes**3)
    begun = len(parts) * chunk_bytes / 2
    z = float(norm.ppf(quantile))

    def demand(factor: float) -> float:
        spread = math.sqrt(factor * second)
        skew = factor * third / spread**3
        return factor * first + begun + spread * (z + skew * (z * z - 1) / 6)

    return demand
