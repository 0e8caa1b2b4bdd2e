"""Device processes' answers to Inspect, put together for people and programs that ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosspool.transport.messages import Inspected


def report(what: str, answers: Sequence[Inspected], models: Sequence[str]) -> Any:
    """With models by name instead of index.

    ``tensors``: one list of {device, role, rank, model, layer, key, name, shape, dtype, bytes}.
    ``pools``, ``counters``: a dict per device, ``device`` among its keys. ``trace_stop``: one list
    of lane events with ``device``, oldest first. ``trace_start``: the devices' names."""
    if what == "trace_start":
        return [answer.device for answer in answers]
    if what in ("pools", "counters"):
        return [{"device": a.device, **_named(a.answer or {}, models)} for a in answers]
    rows = [{"device": a.device, **_named(row, models)} for a in answers for row in a.answer or ()]
    if what == "trace_stop":
        rows.sort(key=lambda row: row["start_ns"])
    return rows


def _named(row: dict[Any, Any], models: Sequence[str]) -> dict[Any, Any]:
    named = dict(row)
    for key, value in row.items():
        if key == "model" and isinstance(value, int):
            named[key] = models[value]
        elif isinstance(value, dict) and value and all(isinstance(k, int) for k in value):
            named[key] = {models[k]: v for k, v in value.items()}
    return named
