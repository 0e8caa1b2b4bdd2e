"""What is asked of the pool: requests per model, as joint samples and, where known, their times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Requests of one model, one row each: the three values of a row belong together, so that
    their correlation is kept wherever rows are drawn."""

    prompt: Ints
    """[n] prompt tokens, at least 1."""
    output: Ints
    """[n] output tokens, at least 1."""
    service: Floats
    """[n] seconds in which the request holds KV cache, above 0 (the paper's T_i)."""

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, eq=False)
class ModelTraffic:
    """Requests of one model."""

    model: str
    rate: float
    """Requests per second, mean over the traffic's time."""
    samples: Samples
    arrivals: Floats | None = None
    """[n] seconds after the traffic's start at which ``samples`` arrived, ascending; None when
    only the rate is known (arrivals are then Poisson)."""


@dataclass(frozen=True, eq=False)
class Traffic:
    models: tuple[ModelTraffic, ...]
    """One per model of the deployment, in its order; a model without requests has rate 0 and no
    samples."""
    seconds: float
    """Length of the time that it covers; infinite for rates without times."""
