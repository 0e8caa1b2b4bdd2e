"""A workload: requests, each with the time at which it is sent, its model, its prompt and the
number of tokens that it asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.bench.dataset import Rows
from crosspool.bench.prompts import Prompt, PromptWriter
from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats, Ints
from crosspool.planner.traffic.trace import Trace

MOST_REQUESTS = 10_000_000
"""More requests in one run are taken for a mistake."""


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request of a workload."""

    arrival: float
    """Seconds after the workload's start."""
    model: str
    prompt: Prompt
    prompt_tokens: int
    """Tokens that the prompt was made to have; the server counts them for itself."""
    max_tokens: int
    """Output tokens that the request asks for."""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """When requests are sent, and to which models."""

    times: Floats
    """[n] seconds after the workload's start, ascending."""
    owners: Ints
    """[n] indices of the models."""

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a workload is sent: a number of requests, or those of some seconds."""

    requests: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.requests is not None and not 1 <= self.requests <= MOST_REQUESTS:
            raise ConfigError(f"--requests {self.requests}: must be from 1 to {MOST_REQUESTS}")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(f"--seconds {self.seconds}: must be a number above 0")

    def of(self, times: Floats) -> int:
        """Returns how many of the ascending ``times`` are within it."""
        count = len(times)
        if self.seconds is not None:
            count = int(np.searchsorted(times, self.seconds, side="left"))
        return count if self.requests is None else min(count, self.requests)


def poisson(rates: Sequence[float] | Floats, extent: Extent, rng: np.random.Generator) -> Arrivals:
    """Draws Poisson arrivals of ``rates[i]`` requests per second for model i: those of the total
    rate, each of which belongs to model i with a probability in proportion to its rate. The
    ``extent`` must name requests or seconds. Raises ConfigError."""
    total = float(np.sum(rates))
    if extent.seconds is not None:
        if total * extent.seconds > MOST_REQUESTS:
            raise ConfigError(f"--rate, --seconds: more than {MOST_REQUESTS} requests")
        count = int(rng.poisson(total * extent.seconds))
        times = np.sort(rng.uniform(0.0, extent.seconds, count))
    else:
        assert extent.requests is not None
        times = np.cumsum(rng.exponential(1 / total, extent.requests))
    return Arrivals(times, _deal(np.asarray(rates) / total, len(times), rng))


def dealt(trace: Trace, popularity: Floats, rng: np.random.Generator) -> Arrivals:
    """Returns the arrivals of a trace, each for model i with probability ``popularity[i]``. Raises
    ConfigError for a trace without arrival times."""
    return Arrivals(arrival_times(trace), _deal(popularity, len(trace), rng))


def arrival_times(trace: Trace) -> Floats:
    """Raises ConfigError for a trace without arrival times."""
    if trace.arrival is None:
        raise ConfigError(
            "--trace: the file has no arrival times; give it as --dataset, and arrivals with --rate"
        )
    return trace.arrival


def _deal(shares: Floats, count: int, rng: np.random.Generator) -> Ints:
    return rng.choice(len(shares), count, p=shares / shares.sum()).astype(np.int64)


def make_workload(
    arrivals: Arrivals, models: Sequence[str], rows: Rows, writers: Sequence[PromptWriter]
) -> list[TimedRequest]:
    """Returns a request for each arrival, with the prompt of its row. ``writers[i]`` writes the
    prompts of model i where the row has no text."""
    made = []
    for number, (time, owner) in enumerate(
        zip(arrivals.times.tolist(), arrivals.owners.tolist(), strict=True)
    ):
        tokens = int(rows.prompt[number])
        text = None if rows.texts is None else rows.texts[number]
        made.append(
            TimedRequest(
                arrival=time,
                model=models[owner],
                prompt=writers[owner].write(tokens) if text is None else text,
                prompt_tokens=tokens,
                max_tokens=int(rows.output[number]),
            )
        )
    return made
