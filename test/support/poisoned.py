"""Lanes that begin with NaN in all that they work in."""

from __future__ import annotations

from typing import Any

import pytest
from crosspool.ranks import gpu_lanes
from crosspool.ranks.gpu_scratch import LanePlaces


class PoisonedPlaces(LanePlaces):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.arena.fill_(0xFF)


def poison_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of devices that are loaded from now on."""
    monkeypatch.setattr(gpu_lanes, "LanePlaces", PoisonedPlaces)
