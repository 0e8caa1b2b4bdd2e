"""Replays of a trace whose models are moved apart in time, each by a time of its own."""

from __future__ import annotations

import numpy as np
from crosspool.planner.demand.replay import ReplayDemand
from crosspool.planner.demand.timeline import Timeline, total
from crosspool.planner.traffic.samples import Floats
from tqdm import tqdm


def independent_shifts(
    demand: ReplayDemand, quantile: float, shifts: int, seed: int, progress: bool | None = None
) -> Floats:
    """Returns [shifts] quantiles of the pool, in bytes. For each, every model's demand over time is
    moved on a circle by a time of its own, uniform over the trace: a model keeps its bursts and how
    often it needs how much, but chance decides whether bursts of different models meet."""
    rng = np.random.default_rng(seed)
    found = np.empty(shifts)
    hidden = None if progress is None else not progress
    for i in tqdm(range(shifts), desc="shifted replays", leave=False, disable=hidden):
        by = rng.uniform(0, demand.pool.seconds, len(demand.models))
        moved = [rotated(model, each) for model, each in zip(demand.models, by, strict=True)]
        found[i] = total(moved).quantile(quantile)
    return found


def rotated(timeline: Timeline, seconds: float) -> Timeline:
    """Returns the timeline moved on a circle by ``seconds``: what leaves at the end comes in at the
    beginning, and every value holds for as long as before."""
    edges = timeline.times + seconds % timeline.seconds
    cut = int(np.searchsorted(edges[:-1], timeline.seconds))
    start, end = np.roll(timeline.start, -cut), np.roll(timeline.end, -cut)
    times = np.append(edges[cut:-1] - timeline.seconds, edges[:cut])
    if edges[cut] > timeline.seconds:
        lasts = timeline.times[cut] - timeline.times[cut - 1]
        share = (timeline.seconds - edges[cut - 1]) / lasts
        last_start, last_end = timeline.start[cut - 1], timeline.end[cut - 1]
        middle = last_start + (last_end - last_start) * share
        times = np.append(0.0, times)
        start = np.append(middle, start)
        end = np.concatenate(([last_end], end[:-1], [middle]))
    times = np.append(times, timeline.seconds)
    kept = np.append(np.diff(times) > 0, True)  # rounding may leave nothing of a piece
    return Timeline(times[kept], start[kept[:-1]], end[kept[:-1]])
