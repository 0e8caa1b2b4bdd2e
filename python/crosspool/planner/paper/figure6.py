"""Figure 6 of the CrossPool paper (arXiv 2606.24506) from byte counts alone: the highest request
rate of each model by context bin, on five 40 GB devices in the paper's three placements.

A rate is the number of requests that fit into the KV memory at once, each whole in the memory that
it sees, over the time for which a request holds it, ``OUTPUT_TOKENS * TBT_S``. That time is the
same in all placements, so ratios do not depend on it.
"""

from __future__ import annotations

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.planner.devices.parallelism import Room
from crosspool.planner.devices.systems import DEVICE_RESERVE, EqualDevices, crosspool, monolithic
from crosspool.planner.shapes import catalogue
from crosspool.planner.shapes.shape import ModelShape

MODELS = {"Q": "Qwen3-30B-A3B", "G": "GLM-4.7-Flash", "D": "DeepSeek-V2-Lite"}
STATIC = ((0, 1), (2, 3), (4,))
"""Devices of Q, G and D."""
SHARED = ((0, 1, 2, 3), (1, 2, 3, 4), (0, 4))
KV_DEVICES = 1
DEVICE_BYTES = 40 * 10**9
TBT_S = {"Q": 0.067, "G": 0.059, "D": 0.041}
"""Time between tokens in seconds: the paper's P99 for CrossPool at 0.2 requests/s per model."""
OUTPUT_TOKENS = 100
"""Output tokens of every request. The paper does not give them; with 100, Q at 4-8K comes near the
paper's 6/s."""
BINS = tuple((size << 10, size << 11) for size in (4, 8, 16, 32, 64))
LABELS = {"static": "static", "kvcached": "kvcached", "crosspool": "CrossPool"}
SYSTEMS = tuple(LABELS)

READ_OFF: dict[tuple[str, int, str], float] = {
    ("Q", 4, "crosspool"): 6,
    ("Q", 4, "kvcached"): 0.7,
    ("Q", 4, "static"): 0.8,
    ("Q", 16, "crosspool"): 0.8,
    ("Q", 16, "kvcached"): 0.08,
    ("Q", 16, "static"): 0.09,
    ("G", 4, "crosspool"): 16,
    ("G", 4, "kvcached"): 0.8,
    ("G", 4, "static"): 0.12,
    ("G", 64, "crosspool"): 0.3,
}
"""Requests per second in the paper's figure by model, bin (K tokens) and system, as read off its
logarithmic scale."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """The rate of a model in one context bin under one system."""

    model: str
    system: str
    low: int
    high: int
    """The bin's requests have from ``low`` to below ``high`` tokens of prompt and output."""
    requests: int
    """Number of requests that fit at once, of the mean length of the bin's requests that fit."""
    rate: float
    """Requests per second; 0 when not even the shortest request fits."""
    served: float
    """Share of the bin's lengths that fit, 0 to 1."""
    paper: float | None
    """The rate read off the paper's figure; None where it was not."""


class Figure6(msgspec.Struct, frozen=True, kw_only=True):
    reserve: float
    free: dict[str, tuple[int, ...]]
    """Bytes of KV memory by system and device."""
    longest: dict[str, dict[str, int]]
    """Tokens of the longest request that the memory can hold, by system and model."""
    cells: tuple[Cell, ...]

    def cell(self, model: str, low_k: int, system: str) -> Cell:
        """Returns the cell of the bin whose lower end is ``low_k`` K tokens."""
        for cell in self.cells:
            if (cell.model, cell.low, cell.system) == (model, low_k << 10, system):
                return cell
        raise KeyError((model, low_k, system))

    def ratio(self, model: str, low_k: int, system: str) -> float | None:
        """Returns CrossPool's rate over the system's; None where the latter is 0."""
        other = self.cell(model, low_k, system).requests
        return self.cell(model, low_k, "crosspool").requests / other if other else None


def paper_ratio(model: str, low_k: int, system: str) -> float | None:
    """Returns the ratio of the rates that were read off; None where either was not."""
    ours = READ_OFF.get((model, low_k, "crosspool"))
    other = READ_OFF.get((model, low_k, system))
    return ours / other if ours and other else None


def figure6(reserve: float = DEVICE_RESERVE, device_bytes: int = DEVICE_BYTES) -> Figure6:
    """Computes the figure. Raises ConfigError when the weights do not fit."""
    shapes = [catalogue.load(name) for name in MODELS.values()]
    devices = EqualDevices(count=5, bytes=device_bytes, reserve=reserve)
    systems = {
        "static": monolithic(shapes, STATIC, devices),
        "kvcached": monolithic(shapes, SHARED, devices),
        "crosspool": crosspool(shapes, KV_DEVICES, devices),
    }
    if systems["crosspool"].free[0] <= 0:
        raise ConfigError(
            f"device reserve {reserve}: it leaves no KV memory on the KV pool's device; lower it"
        )
    kappas = [shape.kv_bytes_per_token for shape in shapes]
    return Figure6(
        reserve=reserve,
        free={name: system.free for name, system in systems.items()},
        longest={
            name: {
                model: room.longest(kappa)
                for model, room, kappa in zip(MODELS, system.rooms, kappas, strict=True)
            }
            for name, system in systems.items()
        },
        cells=tuple(
            _cell(model, name, system.rooms[index], shapes[index], edges)
            for index, model in enumerate(MODELS)
            for name, system in systems.items()
            for edges in BINS
            if edges[0] < shapes[index].context
        ),
    )


def _cell(model: str, name: str, room: Room, shape: ModelShape, edges: tuple[int, int]) -> Cell:
    low, high = edges[0], min(edges[1], shape.context)
    kappa = shape.kv_bytes_per_token
    reach = min(high, room.longest(kappa))
    requests = room.requests((low + reach) // 2 * kappa) if reach >= low else 0
    return Cell(
        model=model,
        system=name,
        low=low,
        high=edges[1],
        requests=requests,
        rate=requests / (OUTPUT_TOKENS * TBT_S[model]),
        served=max(0.0, (reach - low) / (high - low)),
        paper=READ_OFF.get((model, low >> 10, name)),
    )


def cliff(figure: Figure6, model: str, system: str) -> int | None:
    """Returns the lower end of the bin in which the longest request lies; None when that is beyond
    the model's context or the last bin."""
    longest = figure.longest[system][model]
    cells = [cell for cell in figure.cells if (cell.model, cell.system) == (model, system)]
    return next((cell.low for cell in cells if cell.served < 1 and longest < cell.high), None)


def reserves_with_the_papers_cliffs(step: float = 0.0001) -> tuple[float, float] | None:
    """Returns the least and the greatest reserve with which all weights fit, and GLM-4.7-Flash's
    longest request lies in the 16-32K bin under both kvcached and static partition."""
    found = []
    for number in range(round(0.10 / step), round(0.25 / step) + 1):
        figure = figure6(number * step)
        fits = all(min(free) >= 0 for free in figure.free.values())
        both = {cliff(figure, "G", name) for name in ("kvcached", "static")}
        if fits and both == {16 << 10}:
            found.append(round(number * step, 6))
    return (found[0], found[-1]) if found else None
