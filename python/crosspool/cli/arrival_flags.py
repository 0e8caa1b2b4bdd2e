"""Flags that say when which model gets a request of which length: those of ``crosspool bench`` and
``crosspool simulate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crosspool.bench.dataset import Fit, Rows, read_dataset
from crosspool.bench.workload import Arrivals, Extent, arrival_times, dealt, poisson
from crosspool.cli.by_model import per_model, rate
from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.popularity import read_popularity
from crosspool.planner.traffic.spread import named_owners
from crosspool.planner.traffic.trace_files import read_trace

_DATASET = "random:prompt=512,output=128"
_REQUESTS = 100


def add_arrivals(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for rates, popularity, traces and how much of them is sent."""
    group.add_argument(
        "--rate",
        metavar="RATE",
        help="requests per second of all models together, or NAME=RATE,... for each; arrivals are "
        "Poisson",
    )
    group.add_argument(
        "--popularity",
        metavar="LAW",
        help="how requests are dealt to models, the first one most popular: openrouter, "
        "zipf:ALPHA, uniform, or a weight for each model (default: uniform, or the models that a "
        "trace names)",
    )
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="recorded requests whose arrival times are kept, and whose lengths are unless "
        "--dataset gives others; the formats are those of crosspool plan, such as the Azure LLM "
        "traces' CSV",
    )
    group.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="send a trace's requests X times as fast as they came (default: 1)",
    )
    extent = group.add_mutually_exclusive_group()
    extent.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help=f"number of requests (default: {_REQUESTS}, or all of a trace)",
    )
    extent.add_argument(
        "--seconds", type=float, metavar="S", help="send requests for S seconds instead"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)"
    )


def add_lengths(group: argparse._ArgumentGroup) -> None:
    """Adds the flags for the lengths of prompts and outputs."""
    group.add_argument(
        "--dataset",
        metavar="DATASET",
        help="a ShareGPT JSON file, any trace file for its lengths, azure-conversation, azure-code "
        "or random:prompt=TOKENS,output=TOKENS, with range_ratio=R for lengths from R of that on "
        f"(default: the trace's lengths, or {_DATASET})",
    )
    group.add_argument(
        "--scale-lengths", type=float, default=1.0, metavar="X", help="multiply lengths by X"
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="leave out requests whose prompt and output together are longer",
    )


def read_load(
    arguments: argparse.Namespace, models: Sequence[str], counts_tokens: Path | None
) -> tuple[Arrivals, Rows, np.random.Generator, list[str]]:
    """Returns the arrivals, a row for each, a generator for all other draws, and remarks on how
    they were made. ``counts_tokens``: a tokenizer for texts; None estimates their tokens. Raises
    ConfigError."""
    streams = np.random.SeedSequence(_seed(arguments.seed)).spawn(3)
    arrivals_rng, rows_rng, prompts_rng = map(np.random.default_rng, streams)
    fit = Fit(scale=arguments.scale_lengths, context=arguments.context)
    extent = Extent(requests=arguments.requests, seconds=arguments.seconds)
    notes: list[str] = []
    rows: Rows | None = None
    if arguments.trace is not None:
        if arguments.rate is not None:
            raise ConfigError("--rate: --trace has arrival times already; leave one of the two out")
        arrivals, rows = _traced(arguments, models, fit, extent, rng=arrivals_rng, notes=notes)
    else:
        if arguments.scale is not None:
            raise ConfigError("--scale: it is for the arrival times of a --trace")
        if arguments.rate is None:
            raise ConfigError("no load: give --rate, or --trace FILE")
        if extent.requests is None and extent.seconds is None:
            extent = Extent(requests=_REQUESTS)
        arrivals = poisson(_rates(arguments, models), extent, arrivals_rng)
    if not len(arrivals):
        raise ConfigError("no request arrives in that time: give more --seconds, or a higher rate")
    if arguments.dataset is not None or rows is None:
        dataset = read_dataset(arguments.dataset or _DATASET, counts_tokens, fit)
        notes += dataset.notes
        rows = dataset.draw(len(arrivals), rows_rng)
    return arrivals, rows, prompts_rng, notes


def _seed(seed: int) -> int:
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")
    return seed


def _traced(
    arguments: argparse.Namespace,
    models: Sequence[str],
    fit: Fit,
    extent: Extent,
    *,
    rng: np.random.Generator,
    notes: list[str],
) -> tuple[Arrivals, Rows]:
    """Returns the arrivals and the lengths of the trace's requests that fit."""
    scale = 1.0 if arguments.scale is None else arguments.scale
    if not (np.isfinite(scale) and scale > 0):
        raise ConfigError(f"--scale {scale}: must be a number above 0")
    trace = read_trace(arguments.trace)
    notes += trace.notes
    times = arrival_times(trace) / scale
    rows = Rows(trace.prompt, trace.output).scaled(fit.scale)
    if arguments.dataset is None:
        places = fit.places(rows)
        notes += fit.note(len(places), len(rows))
        trace, times, rows = trace.take(places), times[places], rows.take(places)
    if trace.model is not None and arguments.popularity is None:
        owners = named_owners(trace, models)
    else:
        shares = read_popularity(arguments.popularity or "uniform", len(models))
        owners = dealt(trace, shares, rng).owners
    count = extent.of(times)
    return Arrivals(times[:count], owners[:count]), rows.take(np.arange(count))


def _rates(arguments: argparse.Namespace, models: Sequence[str]) -> list[float]:
    """Returns the models' rates in requests per second, in their order. Raises ConfigError."""
    if "=" in arguments.rate:
        if arguments.popularity is not None:
            raise ConfigError(
                "--popularity: --rate already gives each model its rate; leave one of the two out"
            )
        found = per_model(arguments.rate, models, "--rate", rate)
        rates = [found[name] for name in models]
    else:
        shares = read_popularity(arguments.popularity or "uniform", len(models))
        rates = [rate(arguments.rate, "--rate") * float(share) for share in shares]
    if not sum(rates) > 0:
        raise ConfigError("--rate: at least one rate must be above 0 requests per second")
    return rates
