"""What the HTTP process knows of the deployment."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crosspool.frontend.turns import Turns
from crosspool.transport.inspection import Status

if TYPE_CHECKING:
    from crosspool.frontend.model_app import ModelApp


@dataclass
class State:
    """What the HTTP process knows of the deployment; it writes, the application reads."""

    names: list[str] = field(default_factory=list)
    """Names of the models that can be asked for, ascending by number. It stays the same object."""
    models: dict[str, ModelApp] = field(default_factory=dict)
    """Applications by model name; empty until SGLang is imported."""
    status: Status | None = None
    """The scheduler's last status; None before its first answer."""
    message: str = "starting"
    """What is being waited for, or why nothing is served."""
    ready: bool = False
    recovers: bool = False
    """Whether processes that have died are being replaced, and requests wait for that."""
    draining: bool = False
    in_flight: Counter[int] = field(default_factory=Counter)
    """Number of requests that each application, by its ``id()``, is working on; none of them is
    0. Two may have the same name."""
    turns: Turns = field(default_factory=Turns)
    """The turns that requests, and the samples of each, take to begin."""
