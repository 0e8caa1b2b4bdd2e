"""What the scheduler tells of models that come to the fleet and leave it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelAdded:
    """Every device is ready for the model, which takes requests from now on."""

    model: int


@dataclass(frozen=True)
class ModelRefused:
    """The model could not be added, and nothing is left of it anywhere."""

    model: int
    error: str
    """Why, for users."""


@dataclass(frozen=True)
class ModelRemoved:
    """Nothing is left of the model on any device."""

    model: int
    error: str | None = None
    """Why it has left without anybody's word, for users."""


Change = ModelAdded | ModelRefused | ModelRemoved
