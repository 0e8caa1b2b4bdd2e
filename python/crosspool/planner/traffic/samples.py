"""Traffic of a deployment: the requests of each model as joint samples, with their arrival times
where these are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Requests of one model, one row each. Wherever rows are drawn, the three values of a row stay
    together, so that their correlation is kept."""

    prompt: Ints
    """[n] prompt tokens, at least 1."""
    output: Ints
    """[n] output tokens, at least 1."""
    service: Floats
    """[n] seconds for which the request holds KV cache, above 0 (the paper's T_i)."""

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, eq=False)
class ModelTraffic:
    """Requests of one model."""

    model: str
    rate: float
    """Mean number of requests per second over the traffic's time."""
    samples: Samples
    arrivals: Floats | None = None
    """[n] arrival times of ``samples`` in seconds after the traffic's start, ascending; None when
    only the rate is known, and arrivals are Poisson."""


@dataclass(frozen=True, eq=False)
class Traffic:
    models: tuple[ModelTraffic, ...]
    """One entry per model of the deployment, in its order; a model without requests has rate 0 and
    no samples."""
    seconds: float
    """Length of the time that the traffic covers; infinite for rates without arrival times."""
