"""A trace: requests as they came, before they are dealt to a deployment's models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats, Ints


@dataclass(frozen=True, eq=False)
class Trace:
    """One row per request; arrivals ascend where there are any."""

    prompt: Ints
    """[n] prompt tokens, at least 1."""
    output: Ints
    """[n] output tokens, at least 1."""
    arrival: Floats | None = None
    """[n] seconds after the trace's start, ascending; None: the trace tells lengths only."""
    service: Floats | None = None
    """[n] seconds in which the request held KV cache, above 0; None: not recorded."""
    model: list[str] | None = None
    """[n] names of the models that were asked; None: not recorded."""
    notes: tuple[str, ...] = ()
    """What a reader of the plan ought to know of how this was read."""

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def seconds(self) -> float:
        """From the trace's start to its last arrival. Raises ConfigError where that is no time."""
        if self.arrival is None:
            raise ConfigError("the trace has no arrival times: give a request rate beside it")
        if not self.arrival[-1] > 0:
            raise ConfigError("the trace covers no time: all its requests arrive at once")
        return float(self.arrival[-1])

    @property
    def rate(self) -> float:
        """Requests per second. Raises ConfigError as :attr:`seconds` does."""
        return len(self) / self.seconds

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Trace:
        """The rows of an index or a mask, in its order."""
        names = None
        if self.model is not None:
            picked = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
            names = [self.model[row] for row in picked.tolist()]
        return Trace(
            prompt=self.prompt[rows],
            output=self.output[rows],
            arrival=None if self.arrival is None else self.arrival[rows],
            service=None if self.service is None else self.service[rows],
            model=names,
            notes=self.notes,
        )
