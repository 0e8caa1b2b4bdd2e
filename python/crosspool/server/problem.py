"""Why a model was not loaded or not unloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Why a model was not loaded or not unloaded."""

    text: str
    is_mistake: bool
    """Whether it is a mistake of whoever has asked."""


Loaded = Callable[[int | Problem], None]
"""Takes the number of the model that has been loaded."""
Unloaded = Callable[[Problem | None], None]
