"""How fast steps that are at work at once go on: what their parts take of each other's devices.

On an attention rank, lanes take turns layer by layer, so all of them make one layer in the same
time, the rank's *cycle*. It is no shorter than what the rank's device has to do in it, and than the
parts of one layer of any lane, one after another. A device that serves several ranks has no more
than its time to give: the cycles of those that ask for more than that are made longer, alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class StepLoad:
    """What one step takes of devices, in seconds of the whole step."""

    rank: int
    """The attention rank."""
    layers: int
    devices: dict[int, float]
    """Seconds of each device, by its number."""
    alone: float
    """Seconds of the step when nothing else is at work."""


def cycles(loads: Iterable[StepLoad]) -> dict[int, float]:
    """The cycle of each attention rank that has work, in seconds per layer. A step takes its layers
    times the cycle of its rank."""
    least: dict[int, float] = {}
    per_layer: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    """Seconds per layer that the steps of a rank take of a device, indexed [device][rank]."""
    for load in loads:
        alone = load.alone / load.layers
        least[load.rank] = max(least.get(load.rank, 0.0), alone)
        for device, seconds in load.devices.items():
            per_layer[device][load.rank] += seconds / load.layers
    for of_rank in per_layer.values():
        for rank, seconds in of_rank.items():
            least[rank] = max(least[rank], seconds)
    found = dict(least)
    for of_rank in per_layer.values():
        if len(of_rank) > 1:
            level = _level(of_rank, least)
            for rank in of_rank:
                found[rank] = max(found[rank], level)
    return found


def _level(seconds: dict[int, float], least: dict[int, float]) -> float:
    """The shortest cycle for the ranks that share a device so that it keeps up; ranks that are
    slower for other reasons stay as they are. 0 where it keeps up anyway."""
    if sum(of / least[rank] for rank, of in seconds.items() if of) <= 1:
        return 0.0
    slow = sorted(seconds, key=lambda rank: -least[rank])
    busy, rest = 0.0, sum(seconds.values())
    for rank in slow:
        level = rest / (1 - busy)
        if least[rank] <= level:
            return level
        busy += seconds[rank] / least[rank]
        rest -= seconds[rank]
    return 0.0
