"""Groups of weight pool devices that share a model's FFN weights.

A model lies on a run of neighbouring devices, which split every layer evenly (tensor-parallel).
With all models on all devices, bytes and load are balanced perfectly, but every model waits for
every other one, and a short layer stands behind a long one (the second limit of the CrossPool
paper, arXiv 2606.24506, which therefore groups like with like). :func:`group` minimises the sum of
three terms:

* bytes: the fullest device's bytes over the mean,
* load: the busiest device's load over the mean,
* unlike: the spread of the layer times on a device, which is the standard deviation of their
  natural logarithms, weighted by load; its mean over the devices, times ``UNLIKE_WEIGHT``.

A model's load is the number of bytes of FFN weights read per second: requests/s x output tokens x
active FFN bytes. Its layer time is proportional to a layer's active FFN bytes, divided by the
number of devices that share it.

The search starts from every division of the devices into equal runs, to which models are dealt in
the order of their layer times. It moves or exchanges models as long as that lowers the cost. The
tests compare it with the best of all arrangements in small cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size

UNLIKE_WEIGHT = 0.25
"""Layer times with a standard deviation of a factor of e cost as much as an imbalance of 25 %."""
_ALL_RUNS_UP_TO = 12
"""Number of devices up to which all runs are considered."""
_SWAPS_UP_TO = 24
"""Number of models up to which all pairs are exchanged."""
_STARTS = 4
_ROUNDS = 20
_GAIN = 1e-9

Run = tuple[int, int]
"""Devices [first, end)."""


class FFNLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The size and load of one model on the weight pool."""

    name: str
    bytes: int
    """Bytes of the FFN weights."""
    load: float
    """Bytes of FFN weights that are read per second, at least 0."""
    layer_bytes: float
    """Mean number of active FFN bytes per layer, above 0."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    bytes: float
    """Bytes on the fullest device over the mean, at least 1."""
    load: float
    """Load of the busiest device over the mean, at least 1."""
    unlike: float
    """Mean spread of the layer times on a device, at least 0."""

    @property
    def total(self) -> float:
        return self.bytes + self.load + UNLIKE_WEIGHT * self.unlike


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    devices: tuple[tuple[int, ...], ...]
    """Devices that share each model's FFN weights."""
    device_bytes: tuple[int, ...]
    """Bytes on each device."""
    device_load: tuple[float, ...]
    """Share of all load on each device, 0 to 1."""
    cost: Cost


def group(models: Sequence[FFNLoad], devices: int, bytes_per_device: int) -> Groups:
    """Finds an arrangement of low cost. Raises ConfigError when the weights do not fit, and says
    how many devices would be enough."""
    if devices < 1:
        raise ConfigError(f"weight pool devices {devices}: give at least one")
    needed = sum(model.bytes for model in models)
    if needed > devices * bytes_per_device:
        enough = -(-needed // bytes_per_device)
        raise ConfigError(
            f"weight pool devices {devices}: the FFN weights take {format_size(needed)}, and a "
            f"device has room for {format_size(bytes_per_device)}: give at least {enough}"
        )
    search = _Search(models, devices, bytes_per_device)
    found = min((search.improve(start) for start in search.starts()), key=search.score)
    return search.result(found)


def everywhere(models: Sequence[FFNLoad], devices: int, pool_bytes: int) -> Groups:
    """Puts every model on all devices, where they hold ``pool_bytes`` of them at a time: models
    that take each other's room share all of it."""
    run = tuple(range(devices))
    table = _Table(models, devices)
    for index in range(len(models)):
        table.add(index, run, 1)
    return Groups(
        devices=(run,) * len(models),
        device_bytes=(pool_bytes // devices,) * devices,
        device_load=tuple(float(load) for load in table.sums[1]),
        cost=table.cost(),
    )


def cost(models: Sequence[FFNLoad], places: Sequence[Sequence[int]], devices: int) -> Cost:
    """Returns the cost of an arrangement; ``places`` has the devices of each model."""
    table = _Table(models, devices)
    for index, place in enumerate(places):
        table.add(index, list(place), 1)
    return table.cost()


class _Table:
    """The sums per device from which the cost is computed."""

    def __init__(self, models: Sequence[FFNLoad], devices: int) -> None:
        self.bytes = np.array([model.bytes for model in models], dtype=np.float64)
        load = np.array([model.load for model in models], dtype=np.float64)
        # without any traffic all models have the same load
        self.load = load / load.sum() if load.sum() > 0 else np.full(len(models), 1 / len(models))
        self.time = np.log([model.layer_bytes for model in models])
        self.sums: npt.NDArray[np.float64] = np.zeros((5, devices))
        """[5, devices] bytes, load, weight, weight x time, weight x time squared."""

    def share(self, model: int, ranks: int) -> npt.NDArray[np.float64]:
        """Returns [5] contributions of a model to the sums of each of its ``ranks`` devices."""
        time = self.time[model] - math.log(ranks)
        weight = max(self.load[model], 1e-6) / ranks
        held = self.bytes[model] / ranks
        return np.array(
            [held, self.load[model] / ranks, weight, weight * time, weight * time * time]
        )

    def add(self, model: int, place: Sequence[int] | slice, sign: int) -> None:
        ranks = place.stop - place.start if isinstance(place, slice) else len(place)
        self.sums[:, place] += sign * self.share(model, ranks)[:, None]

    def cost(self) -> Cost:
        held, load, unlike = _terms(self.sums)
        return Cost(bytes=float(held), load=float(load), unlike=float(unlike))


def _terms(sums: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Returns [...] bytes, load and unlike for [..., 5, devices] sums."""
    held, load, weight, first, second = np.moveaxis(sums, -2, 0)
    busy = np.maximum(weight, 1e-30)
    spread = np.sqrt(np.maximum(second / busy - (first / busy) ** 2, 0))
    return (
        held.max(-1) / held.mean(-1),
        load.max(-1) / load.mean(-1),
        (spread * weight).sum(-1) / weight.sum(-1),
    )


class _Search:
    def __init__(self, models: Sequence[FFNLoad], devices: int, limit: int) -> None:
        self.models, self.devices, self.limit = models, devices, limit
        self.runs = _runs(devices)
        self.order = sorted(range(len(models)), key=lambda m: models[m].layer_bytes)
        table = _Table(models, devices)
        inside = np.zeros((len(self.runs), devices))
        for row, (first, end) in zip(inside, self.runs, strict=True):
            row[first:end] = 1
        self.added = [
            np.array([table.share(model, end - first) for first, end in self.runs])[:, :, None]
            * inside[:, None, :]
            for model in range(len(models))
        ]
        """Per model, [runs, 5, devices] contributions to the sums when it lies on each run."""

    def starts(self) -> list[list[Run]]:
        """Returns the best few arrangements on 1, 2, ... equal runs of devices, in which models of
        like layer times are together."""
        total = sum(model.bytes for model in self.models)
        found = []
        for parts in range(1, min(self.devices, len(self.models)) + 1):
            cuts = [self.devices * part // parts for part in range(parts + 1)]
            places: list[Run] = [(0, self.devices)] * len(self.models)
            before = 0
            for model in self.order:
                middle = before + self.models[model].bytes / 2
                part = min(parts - 1, int(middle / total * parts))
                run = (cuts[part], cuts[part + 1])
                places[model] = run if run in self.runs else (0, self.devices)
                before += self.models[model].bytes
            found.append(places)
        return sorted(found, key=self.score)[:_STARTS]

    def score(self, places: Sequence[Run]) -> float:
        return float(self._scores(self._table(places).sums))

    def improve(self, places: list[Run]) -> list[Run]:
        """Moves and exchanges models until nothing lowers the cost."""
        sums = self._table(places).sums
        rows = [self.runs.index(run) for run in places]
        best = float(self._scores(sums))
        swaps = [(a, b) for a in range(len(rows)) for b in range(a)]
        for _ in range(_ROUNDS):
            before = best
            for model in range(len(rows)):
                without = sums - self.added[model][rows[model]]
                scores = self._scores(without + self.added[model])
                row = int(scores.argmin())
                if scores[row] < best - _GAIN:
                    best, rows[model], sums = scores[row], row, without + self.added[model][row]
            for a, b in swaps if len(rows) <= _SWAPS_UP_TO else ():
                changed = sums - self.added[a][rows[a]] - self.added[b][rows[b]]
                changed += self.added[a][rows[b]] + self.added[b][rows[a]]
                score = float(self._scores(changed))
                if score < best - _GAIN:
                    best, sums = score, changed
                    rows[a], rows[b] = rows[b], rows[a]
            if best > before - _GAIN:
                break
        return [self.runs[row] for row in rows]

    def _scores(self, sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns [...] costs for [..., 5, devices] sums. A device that is too full adds more than
        any cost, in proportion to the excess."""
        held, load, unlike = _terms(sums)
        over = np.maximum(sums[..., 0, :] - self.limit, 0).sum(-1) / self.limit
        return held + load + UNLIKE_WEIGHT * unlike + np.where(over > 1e-9, 1e6 * (1 + over), 0)

    def _table(self, places: Sequence[Run]) -> _Table:
        table = _Table(self.models, self.devices)
        for model, run in enumerate(places):
            table.add(model, slice(*run), 1)
        return table

    def result(self, places: Sequence[Run]) -> Groups:
        table = self._table(places)
        return Groups(
            devices=tuple(tuple(range(*run)) for run in places),
            device_bytes=tuple(int(size) for size in table.sums[0]),
            device_load=tuple(float(load) for load in table.sums[1]),
            cost=table.cost(),
        )


def _runs(devices: int) -> list[Run]:
    """Returns all runs of few devices; of many devices, the runs of 2^k devices that begin at a
    multiple of 2^k."""
    if devices <= _ALL_RUNS_UP_TO:
        return [(a, b) for a in range(devices) for b in range(a + 1, devices + 1)]
    sizes = [1 << power for power in range(devices.bit_length())]
    found = [(a, a + size) for size in sizes for a in range(0, devices - size + 1, size)]
    return found if (0, devices) in found else [*found, (0, devices)]
