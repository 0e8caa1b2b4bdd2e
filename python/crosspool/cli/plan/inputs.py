"""Reads models, devices and traffic from the words of ``crosspool plan``."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from crosspool.cli.by_model import per_model, rate
from crosspool.config.errors import ConfigError
from crosspool.config.sizes import size_of
from crosspool.models.spec import KVCacheDType
from crosspool.planner.devices.systems import EqualDevices
from crosspool.planner.network import HostNetwork
from crosspool.planner.request import PlanModel
from crosspool.planner.shapes import catalogue
from crosspool.planner.shapes.held import held_shape
from crosspool.planner.traffic.lengths import PUBLISHED, Lengths, LogNormal, read_length
from crosspool.planner.traffic.popularity import read_popularity
from crosspool.planner.traffic.samples import Traffic
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.spread import at_rates, by_lengths, by_model, spread
from crosspool.planner.traffic.trace import Trace
from crosspool.planner.traffic.trace_files import read_trace

DEFAULT_TBT_MS = 50.0
WINDOW = 60.0
"""Seconds for which a trace's rates count as constant, if it lasts ``_WINDOWS`` times as long."""
_WINDOWS = 10
_DRAWN = 20_000
"""Requests that are drawn for each model from its length statistics."""
_MOST_COPIES = 10_000
_COPIES = re.compile(r"(\d+)x(.+)")
_NETWORK = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG])bit\s*,\s*(\d+(?:\.\d+)?)\s*(us|ms)")
_BITS = {"k": 1e3, "M": 1e6, "G": 1e9}
_PER_SECOND = {"us": 1e6, "ms": 1e3}
_DEVICES = re.compile(r"(?:(-?\d+)\s*x\s*)?(.+)")


def models(
    words: Sequence[str],
    context: Sequence[str],
    paths: Sequence[str],
    *,
    weights: str | None = None,
    codes: bool = False,
    kv_cache_dtype: KVCacheDType = "auto",
) -> tuple[list[PlanModel], dict[str, Path]]:
    """Returns the models, and the checkpoint folders of those that have one.

    Each of ``words`` is ``MODEL``, ``NAME=MODEL`` or ``NxMODEL``, where a model is a name from the
    catalogue or the path of a config.json or of its folder. ``weights``: the format in which all of
    them are held. ``codes``: whether devices hold quantised checkpoints as codes.
    ``kv_cache_dtype``: how the KV caches of all of them are held. Raises ConfigError."""
    found: list[PlanModel] = []
    folders: dict[str, Path] = {}
    for word in words:
        name, _, model = word.rpartition("=")
        copies = _COPIES.fullmatch(model)
        number = int(copies.group(1)) if copies else 1
        if not 1 <= number <= _MOST_COPIES:
            raise ConfigError(
                f"model {word!r}: {number} copies: the number must be from 1 to {_MOST_COPIES}"
            )
        source = copies.group(2) if copies else model
        shape = catalogue.find(source)
        if weights is not None or codes:
            shape = held_shape(shape, catalogue.file_of(source), weights)
        shape = msgspec.structs.replace(shape, kv_cache_dtype=kv_cache_dtype)
        is_path = Path(source).suffix == ".json" or Path(source).is_dir()
        base = name or shape.id
        for copy in range(number):
            called = base if number == 1 else f"{base}-{copy + 1}"
            found.append(PlanModel(name=called, shape=shape))
            if is_path:
                path = Path(source)
                folders[called] = path if path.is_dir() else path.parent
    names = [model.name for model in found]
    for word in paths:
        name, separator, folder = word.partition("=")
        if not separator or name not in names:
            raise ConfigError(
                f"--model-path {word!r}: write NAME=DIR, NAME being one of {', '.join(names)}"
            )
        folders[name] = Path(folder)
    contexts = _contexts(context, names)
    return [
        PlanModel(name=model.name, shape=model.shape, context=contexts.get(model.name))
        for model in found
    ], folders


def _contexts(words: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found |= per_model(word, names, "--context", _tokens, partial=True)
    return found


def devices(text: str | None, reserve: float, weight_reserve: float) -> EqualDevices:
    """Reads ``5x40GB`` or ``40GB``. Raises ConfigError."""
    if not text:
        raise ConfigError("--devices is missing: give their number and memory, such as 5x40GB")
    match = _DEVICES.fullmatch(text.strip())
    assert match is not None
    return EqualDevices(
        count=int(match.group(1) or 1),
        bytes=size_of(match.group(2), f"--devices {text!r}"),
        reserve=reserve,
        weight_reserve=weight_reserve,
    )


def network(text: str) -> HostNetwork:
    """Reads ``25Gbit,50us``: bits per second, and the time of one way. Raises ConfigError."""
    match = _NETWORK.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"--network {text!r}: give bits per second and the latency of one way, such as "
            "25Gbit,50us"
        )
    rate, bits, latency, seconds = match.groups()
    return HostNetwork(
        bytes_per_s=float(rate) * _BITS[bits] / 8, latency_s=float(latency) / _PER_SECOND[seconds]
    )


def traffic(
    arguments: argparse.Namespace, names: Sequence[str]
) -> tuple[Traffic, float | None, tuple[str, ...]]:
    """Returns the traffic, the window of constant rates in seconds, and notes for the reader.
    Raises ConfigError."""
    made_of = [f"--{name}" for name in ("lengths", "prompt", "output") if getattr(arguments, name)]
    if arguments.trace is None:
        if arguments.rate is None:
            raise ConfigError(
                "no traffic: give --trace FILE, or --rate with --prompt and --output (or --lengths)"
            )
        speed = _speed(arguments)
        made = by_lengths(
            _lengths(arguments),
            _rates(arguments, names),
            names,
            _DRAWN,
            arguments.seed,
            speed=speed,
        )
        return made, _window(arguments, made), _speed_note(arguments, speed)
    if made_of:
        raise ConfigError(
            f"{', '.join(made_of)}: the trace already gives the lengths; leave one of the two out"
        )
    trace = read_trace(arguments.trace, arguments.trace_format, tokenizer=arguments.tokenizer)
    if trace.service is not None and arguments.tbt_ms is None:
        made = _of_trace(arguments, trace, names, None)
        return made, _window(arguments, made), trace.notes
    speed = _speed(arguments)
    made = _of_trace(arguments, trace, names, speed)
    return made, _window(arguments, made), trace.notes + _speed_note(arguments, speed)


def _of_trace(
    arguments: argparse.Namespace,
    trace: Trace,
    names: Sequence[str],
    speed: DecodeSpeed | None,
) -> Traffic:
    if arguments.rate is not None:
        return at_rates(trace, _rates(arguments, names), names, speed=speed)
    if trace.arrival is None:
        raise ConfigError(f"--trace {arguments.trace} has no arrival times: give --rate as well")
    if arguments.popularity is not None or (trace.model is None and len(names) == 1):
        shares = read_popularity(arguments.popularity or "uniform", len(names))
        return spread(trace, shares, names, arguments.seed, speed=speed)
    if trace.model is None:
        raise ConfigError(
            f"--trace {arguments.trace} does not say which model each request is for: give "
            "--popularity, such as openrouter, to deal requests to models"
        )
    return by_model(trace, names, speed=speed)


def _rates(arguments: argparse.Namespace, names: Sequence[str]) -> list[float]:
    """Rates of the models, in their order; a single number is the rate of all of them together."""
    text = arguments.rate
    if "=" in text:
        if arguments.popularity is not None:
            raise ConfigError(
                "--popularity: --rate already gives each model its rate; leave one of the two out"
            )
        found = per_model(text, names, "--rate", rate)
        return [found[name] for name in names]
    shares = read_popularity(arguments.popularity or "uniform", len(names))
    total = rate(text, "--rate")
    if total == 0:
        raise ConfigError("--rate 0: must be above 0 requests per second")
    return [total * float(share) for share in shares]


def _tokens(text: str, where: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{where} {text!r}: must be a number of tokens")
    return int(text)


def _lengths(arguments: argparse.Namespace) -> Lengths:
    if arguments.lengths is not None:
        if arguments.prompt or arguments.output:
            raise ConfigError("--lengths: give either --lengths, or --prompt and --output")
        return PUBLISHED[arguments.lengths]
    for flag in ("prompt", "output"):
        if getattr(arguments, flag) is None:
            raise ConfigError(
                f"--{flag} is missing: give a number of tokens, or a law such as mean=512,sigma=1"
            )
    return Lengths(
        prompt=_length("--prompt", arguments.prompt), output=_length("--output", arguments.output)
    )


def _length(flag: str, text: str) -> LogNormal:
    try:
        return read_length(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _speed(arguments: argparse.Namespace) -> DecodeSpeed:
    tbt = DEFAULT_TBT_MS if arguments.tbt_ms is None else arguments.tbt_ms
    prefill = arguments.prefill_tokens_per_s
    return DecodeSpeed(
        tbt_s=tbt / 1000,
        prefill_tokens_per_s=math.inf if prefill is None else prefill,
        ttft_s=arguments.ttft_ms / 1000,
    )


def _speed_note(arguments: argparse.Namespace, speed: DecodeSpeed) -> tuple[str, ...]:
    if arguments.tbt_ms is not None:
        return ()
    return (
        f"requests are assumed to last {1000 * speed.tbt_s:g} ms per output token; --tbt-ms sets "
        "another time",
    )


def _window(arguments: argparse.Namespace, made: Traffic) -> float | None:
    text = arguments.window
    timed = all(model.arrivals is not None for model in made.models)
    if text == "none":
        return None
    if text is None:
        return WINDOW if timed and made.seconds >= _WINDOWS * WINDOW else None
    try:
        window = float(text)
    except ValueError:
        window = math.nan
    if not (math.isfinite(window) and window > 0):
        raise ConfigError(f"--window {text!r}: must be a number of seconds above 0, or none")
    if not timed:
        raise ConfigError("--window: rates change only in a trace with arrival times")
    return window
