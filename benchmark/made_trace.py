"""Makes traces of several models from their rates and lengths, and writes them to a file.

Example::

    chat = Lengths(prompt=lognormal(mean=200, sigma=1.0), output=lognormal(mean=150, sigma=0.7))
    loads = [Load(model="a", rate=2.0, lengths=chat), Load(model="b", rate=0.1, lengths=chat)]
    write_trace(generate(loads, seconds=600, seed=0), Path("ten-minutes.jsonl"))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.lengths import Lengths
from crosspool.planner.traffic.samples import Floats
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.trace import Trace

_MOST_REQUESTS = 100_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """The requests of one model as a renewal process. Raises ConfigError."""

    model: str
    rate: float
    """Requests per second, at least 0."""
    lengths: Lengths
    gap_cv: float = 1.0
    """Coefficient of variation of the gaps between arrivals, which are gamma-distributed: with 1
    arrivals are Poisson, above 1 they come in bursts, below 1 they are more regular."""
    speed: DecodeSpeed | None = None
    """Decode speed that gives the requests service times; None for no service times."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise ConfigError(f"rate of {self.model} {self.rate}: must be a number of at least 0")
        if not 0.01 <= self.gap_cv <= 100:
            raise ConfigError(f"gap_cv of {self.model} {self.gap_cv}: must be from 0.01 to 100")


def generate(loads: Sequence[Load], seconds: float, seed: int) -> Trace:
    """Draws ``seconds`` of endless traffic, in the order of arrival. A model's requests depend only
    on the seed and on its place in ``loads``. Raises ConfigError, also when no request happens to
    arrive."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"seconds {seconds}: must be a finite number above 0")
    if not loads:
        raise ConfigError("no load is given: name at least one model and its rate")
    timed = {load.speed is not None for load in loads if load.rate > 0}
    if len(timed) > 1:
        raise ConfigError("either all models or none must have a decode speed")
    if sum(load.rate for load in loads) * seconds > _MOST_REQUESTS:
        raise ConfigError(f"a trace of more than {_MOST_REQUESTS} requests: lower rates or seconds")
    seeds = np.random.SeedSequence(seed).spawn(len(loads))
    columns = [_of_model(load, seconds, own) for load, own in zip(loads, seeds, strict=True)]
    arrival, prompt, output, service = (
        np.concatenate(parts) for parts in zip(*columns, strict=True)
    )
    if not len(arrival):
        raise ConfigError("no request arrives in this time: raise the rates or the seconds")
    names = [
        load.model
        for load, column in zip(loads, columns, strict=True)
        for _ in range(len(column[0]))
    ]
    trace = Trace(
        prompt=prompt,
        output=output,
        arrival=arrival,
        service=service if timed == {True} else None,
        model=names,
    )
    return trace.take(np.argsort(arrival, kind="stable"))


def write_trace(trace: Trace, file: Path) -> None:
    """Writes the project's JSONL: a line per request with ``arrival`` (seconds), ``model``,
    ``prompt_tokens``, ``output_tokens`` and ``service_seconds``, as far as the trace has them."""
    columns: dict[str, Sequence[object]] = {}
    if trace.arrival is not None:
        columns["arrival"] = trace.arrival.tolist()
    if trace.model is not None:
        columns["model"] = trace.model
    columns["prompt_tokens"] = trace.prompt.tolist()
    columns["output_tokens"] = trace.output.tolist()
    if trace.service is not None:
        columns["service_seconds"] = trace.service.tolist()
    encoder = msgspec.json.Encoder()
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    with file.open("wb") as stream:
        stream.writelines(encoder.encode(row) + b"\n" for row in rows)


def _of_model(
    load: Load, seconds: float, seed: np.random.SeedSequence
) -> tuple[Floats, np.ndarray, np.ndarray, Floats]:
    """Draws arrivals, prompt and output tokens, and service times (0 without a speed)."""
    times, sizes = (np.random.default_rng(own) for own in seed.spawn(2))
    arrival = _arrivals(load.rate, load.gap_cv, seconds, times)
    prompt, output = load.lengths.draw(len(arrival), sizes)
    service = np.zeros(len(arrival)) if load.speed is None else load.speed.seconds(prompt, output)
    return arrival, prompt, output, service


def _arrivals(rate: float, cv: float, seconds: float, rng: np.random.Generator) -> Floats:
    """Draws ascending times in [0, seconds) of a gamma renewal process that was always running.

    The gap in which time 0 lies is longer than others (its density is weighted by its length), and
    time 0 anywhere in it: drawn so, the expected number of arrivals is ``rate * seconds`` whatever
    the burstiness (Cox, Renewal Theory, 1962, on stationary processes)."""
    if rate == 0:
        return np.empty(0)
    shape, scale = cv**-2, cv**2 / rate
    last = rng.random() * rng.gamma(shape + 1, scale)
    parts = [np.array([last])]
    while last < seconds:
        more = 16 + int((seconds - last) * rate * 1.1)
        parts.append(last + np.cumsum(rng.gamma(shape, scale, more)))
        last = parts[-1][-1]
    times = np.concatenate(parts)
    return times[times < seconds]
