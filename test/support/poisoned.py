"""Lanes of a GPU for tests: with NaN in all that they work in, and with few programs."""

from __future__ import annotations

from typing import Any

import pytest
from crosspool.kernels.triton import attention
from crosspool.ranks.gpu import lanes as gpu_lanes
from crosspool.ranks.gpu.scratch import LaneBuffers


class PoisonedPlaces(LaneBuffers):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.arena.fill_(0xFF)


def poison_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisons the lanes of devices that are loaded from now on."""
    monkeypatch.setattr(gpu_lanes, "LaneBuffers", PoisonedPlaces)


def with_few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are then split among few programs, which Triton's interpreter runs one by one."""
    monkeypatch.setattr(attention, "MULTIPROCESSORS", 4)
