"""Lanes of a GPU for tests, with NaN in all that they work in."""

from __future__ import annotations

from typing import Any

import pytest
from crosspool.ranks.gpu import lanes as gpu_lanes
from crosspool.ranks.gpu.scratch import LaneBuffers


class PoisonedPlaces(LaneBuffers):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.arena.fill_(0xFF)


def poison_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisons the lanes of devices that are loaded from now on."""
    monkeypatch.setattr(gpu_lanes, "LaneBuffers", PoisonedPlaces)
