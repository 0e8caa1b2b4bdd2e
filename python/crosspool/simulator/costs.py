"""Times that parts of a step take on one machine: the table that the simulator computes with.

``python -m benchmark.calibrate`` measures a table. It is JSON, and may as well be written by hand
from public figures; ``source`` says where its figures come from.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from crosspool.config.errors import ConfigError

VERSION = 1

Point = tuple[float, float]
"""A number of tokens, and the seconds that they take."""


class Curve:
    """Seconds by a number of tokens: straight lines through ``points``, which are ascending."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._tokens = [tokens for tokens, _ in points]
        self._seconds = [seconds for _, seconds in points]
        self._known: dict[int, float] = {}

    def at(self, tokens: int) -> float:
        """Seconds of ``tokens`` tokens. Below the first point it is the first point's; behind the
        last one, the last line goes on."""
        seconds = self._known.get(tokens)
        if seconds is None:
            seconds = self._known[tokens] = self._between(tokens)
        return seconds

    def _between(self, tokens: int) -> float:
        after = bisect_left(self._tokens, tokens)
        if after == 0:
            return self._seconds[0]
        if len(self._tokens) == 1:
            return self._seconds[0] * tokens / self._tokens[0]
        after = min(after, len(self._tokens) - 1)
        low, high = self._tokens[after - 1], self._tokens[after]
        share = (tokens - low) / (high - low)
        return self._seconds[after - 1] + share * (self._seconds[after] - self._seconds[after - 1])


class ShapeCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times of a model's shape. Parts are those of all layers together, in seconds, each measured
    while nothing else runs on its device."""

    layers: int
    attention: list[Point]
    """Attention parts of a step, by its tokens, without the reading of earlier KV."""
    decode_read: float
    """Seconds that one decoding row adds for each token before it."""
    chunk_read: float
    """Seconds that one token of a prompt chunk adds for each token before it."""
    ffn: list[Point]
    """FFN parts of a step, by its tokens, when one device has all of them."""
    head: list[Point]
    """LM head and sampling, by the rows that yield a token."""
    crossing: float = 0.0
    """Seconds from an attention part to its FFN part and back, of one layer, beyond the parts; only
    where the pools are on different devices."""


class HostCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times of everything around the devices, in seconds."""

    arrival: float = 0.0
    """Time from the sending of a request to its arrival in the scheduler."""
    arrival_token: float = 0.0
    """What each prompt token adds to that."""
    turn: float = 0.0
    """Time from a step's end on the device to the start of the step that follows from it; under a
    lease, only its first step takes it."""
    step: float = 0.0
    """Time that every step takes a device beside its parts."""
    first_token: float = 0.0
    """Time from a sampled token to its arrival at the client."""
    end: float = 0.0
    """Time from the arrival of the last token to the end of the stream."""


class CostTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Costs of models on one kind of device, as a file has them."""

    form: Literal["crosspool-costs"] = "crosspool-costs"
    version: int = VERSION
    source: str
    """Where the figures come from: the command that measured them, or the publication."""
    machine: dict[str, str | int] = {}
    models: dict[str, ShapeCosts]
    """Costs by the model's name. ``*`` is for every model that is not named."""
    wake_bytes_per_s: float
    """Bytes of weights that a device reads per second when a model wakes."""
    wake: float = 0.0
    """Seconds that a wake takes beside the reading."""
    host: HostCosts = HostCosts()

    def of(self, name: str) -> ShapeCosts:
        """Raises ConfigError for a model that the table lacks."""
        costs = self.models.get(name) or self.models.get("*")
        if costs is None:
            raise ConfigError(
                f"costs: there is no model {name!r}, only {', '.join(sorted(self.models))}; "
                "measure it, or give costs for every other model under the name *"
            )
        return costs


def read_costs(path: Path) -> CostTable:
    """Raises ConfigError that names the field."""
    try:
        table = msgspec.json.decode(path.read_bytes(), type=CostTable)
    except OSError as error:
        raise ConfigError(f"costs {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"costs {path}: {error}") from None
    if table.version != VERSION:
        raise ConfigError(f"costs {path}: version {table.version}; this program reads {VERSION}")
    if not (math.isfinite(table.wake_bytes_per_s) and table.wake_bytes_per_s > 0):
        raise ConfigError(f"costs {path}: wake_bytes_per_s must be above 0")
    _check_seconds(path, "wake", table.wake)
    for field in HostCosts.__struct_fields__:
        _check_seconds(path, f"host.{field}", getattr(table.host, field))
    for name, shape in table.models.items():
        where = f"models.{name}"
        if shape.layers < 1:
            raise ConfigError(f"costs {path}: {where}.layers must be 1 or more")
        for field in ("decode_read", "chunk_read", "crossing"):
            _check_seconds(path, f"{where}.{field}", getattr(shape, field))
        for field in ("attention", "ffn", "head"):
            _check_points(path, f"{where}.{field}", getattr(shape, field))
    return table


def write_costs(table: CostTable, path: Path) -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"costs {path}: {error.strerror}") from None


def _check_points(path: Path, field: str, points: Sequence[Point]) -> None:
    if not points:
        raise ConfigError(f"costs {path}: {field} needs one point [tokens, seconds] or more")
    tokens = [at for at, _ in points]
    if tokens[0] <= 0 or any(a >= b for a, b in itertools.pairwise(tokens)):
        raise ConfigError(f"costs {path}: {field}: tokens must be above 0, and ascend")
    for _, seconds in points:
        _check_seconds(path, field, seconds)


def _check_seconds(path: Path, field: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ConfigError(f"costs {path}: {field} must be seconds, 0 or more, not {seconds}")
