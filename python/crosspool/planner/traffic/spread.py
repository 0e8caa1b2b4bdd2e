"""Makes a deployment's traffic from requests: which model each is for, and how often they come.

Example::

    trace = read_trace(Path("AzureLLMInferenceTrace_conv.csv"))
    speed = DecodeSpeed(tbt_s=0.03, prefill_tokens_per_s=4000)
    spread(trace, openrouter(30), names, seed=0, speed=speed)  # dealt out, arrival by arrival
    at_rates(trace, trace.rate * openrouter(30), names, speed=speed)  # the same, as Poisson rates
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.lengths import Lengths
from crosspool.planner.traffic.samples import Floats, Ints, ModelTraffic, Samples, Traffic
from crosspool.planner.traffic.service_time import DecodeSpeed, service_times
from crosspool.planner.traffic.trace import Trace


def spread(
    trace: Trace,
    popularity: Floats,
    models: Sequence[str],
    seed: int | np.random.Generator,
    *,
    speed: DecodeSpeed | None,
) -> Traffic:
    """Deals a trace's requests to models, each to model i with probability ``popularity[i]``; the
    models that the trace names do not matter. Raises ConfigError, also without arrival times."""
    if len(popularity) != len(models):
        raise ConfigError(f"popularity has {len(popularity)} shares for {len(models)} models")
    rng = np.random.default_rng(seed)
    owner = rng.choice(len(models), len(trace), p=popularity / popularity.sum())
    return _deal(trace, owner, models, speed)


def by_model(trace: Trace, models: Sequence[str], *, speed: DecodeSpeed | None) -> Traffic:
    """Returns the traffic of a trace that names its models, in any case. Raises ConfigError for a
    name that is not in ``models``."""
    return _deal(trace, named_owners(trace, models), models, speed)


def named_owners(trace: Trace, models: Sequence[str]) -> Ints:
    """Returns [n] indices into ``models``: the models that the trace names, in any case. Raises
    ConfigError for a name that is not in ``models``, and for a trace that names none."""
    if trace.model is None:
        raise ConfigError(
            "the trace does not say which model each request is for: give a popularity to deal "
            "requests to models"
        )
    index = {model.lower(): number for number, model in enumerate(models)}
    for name in sorted(set(trace.model)):
        if name.lower() not in index:
            close = difflib.get_close_matches(name.lower(), index, n=1)
            known = [models[index[close[0]]]] if close else models
            raise ConfigError(
                f"the trace has requests for {name!r}, which is not deployed; "
                f"{'the closest name is' if close else 'deployed are'} " + ", ".join(known)
            )
    return np.array([index[name.lower()] for name in trace.model], dtype=np.int64)


def at_rates(
    trace: Trace,
    rates: Sequence[float] | Floats,
    models: Sequence[str],
    *,
    speed: DecodeSpeed | None,
) -> Traffic:
    """Returns Poisson arrivals at ``rates[i]`` requests per second for model i, whose lengths are
    drawn from all of the trace's requests. Raises ConfigError."""
    _check_rates(rates, models)
    samples = Samples(trace.prompt, trace.output, service_times(trace, speed))
    return Traffic(
        models=tuple(
            ModelTraffic(model=model, rate=float(rate), samples=samples)
            for model, rate in zip(models, rates, strict=True)
        ),
        seconds=math.inf,
    )


def by_lengths(
    lengths: Lengths,
    rates: Sequence[float] | Floats,
    models: Sequence[str],
    samples: int,
    seed: int,
    *,
    speed: DecodeSpeed,
) -> Traffic:
    """Returns Poisson arrivals at ``rates[i]`` requests per second for model i, with ``samples``
    requests drawn for every model. Raises ConfigError."""
    _check_rates(rates, models)
    if samples < 1:
        raise ConfigError(f"samples {samples}: must be at least 1")
    traffic = []
    seeds = np.random.SeedSequence(seed).spawn(len(models))
    for model, rate, own in zip(models, rates, seeds, strict=True):
        prompt, output = lengths.draw(samples, np.random.default_rng(own))
        drawn = Samples(prompt, output, speed.seconds(prompt, output))
        traffic.append(ModelTraffic(model=model, rate=float(rate), samples=drawn))
    return Traffic(models=tuple(traffic), seconds=math.inf)


def _deal(
    trace: Trace, owner: np.ndarray, models: Sequence[str], speed: DecodeSpeed | None
) -> Traffic:
    """Returns the traffic in which request i is for the model ``owner[i]``."""
    seconds = trace.seconds
    dealt = []
    for number, model in enumerate(models):
        own = trace.take(owner == number)
        dealt.append(
            ModelTraffic(
                model=model,
                rate=len(own) / seconds,
                samples=Samples(own.prompt, own.output, service_times(own, speed)),
                arrivals=own.arrival,
            )
        )
    return Traffic(models=tuple(dealt), seconds=seconds)


def _check_rates(rates: Sequence[float] | Floats, models: Sequence[str]) -> None:
    if len(rates) != len(models):
        raise ConfigError(f"{len(rates)} request rates for {len(models)} models: give one for each")
    for model, rate in zip(models, rates, strict=True):
        if not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"rate of {model} {rate}: must be a finite number of at least 0")
    if not any(rate > 0 for rate in rates):
        raise ConfigError("all request rates are 0: at least one must be above 0")
