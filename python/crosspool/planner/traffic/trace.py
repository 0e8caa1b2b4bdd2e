"""A trace: requests as they were recorded, before they are dealt to a deployment's models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats, Ints


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests, one row each, in the order of arrival where that is known."""

    prompt: Ints
    """[n] prompt tokens, at least 1."""
    output: Ints
    """[n] output tokens, at least 1."""
    arrival: Floats | None = None
    """[n] arrival times in seconds after the trace's start, ascending; None when the trace has
    lengths only."""
    service: Floats | None = None
    """[n] seconds for which the request held KV cache, above 0; None when not recorded."""
    model: list[str] | None = None
    """[n] names of the models that the requests were for; None when not recorded."""
    notes: tuple[str, ...] = ()
    """Remarks on how the file was read, for the reader of a plan."""

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def seconds(self) -> float:
        """Seconds from the trace's start to its last arrival. Raises ConfigError when there are
        no arrival times, or all requests arrive at once."""
        if self.arrival is None:
            raise ConfigError("the trace has no arrival times: give a request rate as well")
        if not self.arrival[-1] > 0:
            raise ConfigError("the trace covers no time: all its requests arrive at once")
        return float(self.arrival[-1])

    @property
    def rate(self) -> float:
        """Mean number of requests per second. Raises ConfigError as :attr:`seconds` does."""
        return len(self) / self.seconds

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Trace:
        """Returns the rows that an index or a mask selects, in its order."""
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
