"""What goes into a simulation, and what comes of each request."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from crosspool.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request as a client sends it. No two requests have the same tokens, except for those that
    a prefix gives them."""

    arrival: float
    """Seconds from the start."""
    model: int
    """The model's number."""
    prompt: int
    """Prompt tokens."""
    output: int
    """Output tokens, all of which are generated."""
    prefix: int = 0
    """First tokens of the prompt that all requests of its model with a prefix share."""

    def tokens(self, number: int) -> list[int]:
        """The prompt, for the request of this number."""
        shared = min(self.prefix, self.prompt)
        own = [1 + (number >> shift & 0xFF) for shift in (0, 8, 16, 24)]
        return ([1] * shared + own + [2] * (self.prompt - shared))[: self.prompt]


@dataclass(slots=True)
class RequestOutcome:
    """What came of a request; times are seconds from the start, as its client sees them."""

    first: float = math.nan
    """Time of its first token."""
    last: float = math.nan
    """Time of its latest token."""
    end: float = math.nan
    """Time at which it was answered or refused."""
    tokens: int = 0
    """Tokens that it has yielded."""
    status: int = 0
    """HTTP status; 0 while it is not over."""


@dataclass(frozen=True)
class DeviceLoss:
    """A device process that dies, and is there again after a while."""

    device: str
    at: float
    """Seconds from the start."""
    seconds: float
    """Seconds until the next one is ready."""


def read_losses(words: Iterable[str]) -> list[DeviceLoss]:
    """Reads ``cpu:1@60+5``: the device's name, when it is lost, and for how long, in seconds.
    Raises ConfigError."""
    found = []
    for word in words:
        name, _, times = word.rpartition("@")
        at, _, seconds = times.partition("+")
        try:
            loss = DeviceLoss(name, float(at), float(seconds))
        except ValueError:
            loss = DeviceLoss("", math.nan, math.nan)
        if not (loss.device and 0 <= loss.at < math.inf and 0 < loss.seconds < math.inf):
            raise ConfigError(
                f"--lose {word!r}: write DEVICE@SECONDS+SECONDS, such as cpu:1@60+5 for a device "
                "that is lost after 60 s and back 5 s later"
            )
        found.append(loss)
    return found
