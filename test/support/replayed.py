"""A short trace of two models, and the paper's formula of its demand, without pages and chunks."""

from __future__ import annotations

import numpy as np
from crosspool.planner.demand.kv_model import KVModel, kv_loads
from crosspool.planner.demand.timeline import Timeline
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic

SECONDS = 100.0
MODELS = (KVModel("m0", 3, 16, 5000), KVModel("m1", 7, 8, 5000))


def model(name: str, requests: int, seed: int) -> ModelTraffic:
    rng = np.random.default_rng(seed)
    rows = Samples(
        rng.integers(1, 300, requests),
        rng.integers(1, 400, requests),
        rng.uniform(0.5, 20, requests),
    )
    arrivals = np.sort(rng.uniform(0, SECONDS, requests))
    return ModelTraffic(name, requests / SECONDS, rows, arrivals)


TRAFFIC = Traffic((model("m0", 60, 0), model("m1", 40, 1)), SECONDS)
GRID = (np.arange(40_000) + 0.5) * SECONDS / 40_000


def formula_timeline(traffic: Traffic, kv_models: tuple[KVModel, ...]) -> Timeline:
    """The paper's K(t) = sum over requests of kappa * Q(t - A), to the byte: piecewise linear."""
    at, change, slope = [], [], []
    for load in kv_loads(traffic, kv_models, 1):
        rows, kappa = load.samples, np.float64(load.kv.kv_bytes_per_token)
        assert load.arrivals is not None
        growth = kappa * rows.output / rows.service
        at += [load.arrivals, load.arrivals + rows.service]
        change += [kappa * rows.prompt, -kappa * (rows.prompt + rows.output)]
        slope += [growth, -growth]
    return Timeline.of_slopes(
        np.concatenate(at), np.concatenate(change), np.concatenate(slope), traffic.seconds
    )
