"""The result of a run, as JSON: its arguments, its machine, its figures and every request."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

import crosspool
from crosspool.bench.client import Sending
from crosspool.bench.figures import (
    KEEPS_UP_SECONDS,
    LoadFigures,
    Objectives,
    Percentiles,
    figures,
    percentiles,
)
from crosspool.bench.record import RequestRecord
from crosspool.config.errors import ConfigError
from crosspool.observability import machine

VERSION = 1


class ClientFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the client itself kept up."""

    lateness: Percentiles | None
    """Seconds by which requests were sent after their time."""
    lag: Percentiles | None
    """Seconds by which the client's loop ran late, and so may have noted a token."""
    cpu_s: float

    @property
    def keeps_up(self) -> bool:
        return all(
            late is None or late.p99 <= KEEPS_UP_SECONDS for late in (self.lateness, self.lag)
        )


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``crosspool bench --out`` writes. Times are in seconds."""

    form: Literal["crosspool-bench"] = "crosspool-bench"
    version: int = VERSION
    crosspool: str
    date: str
    url: str
    arguments: dict[str, Any]
    """The flags; no key is among them."""
    machine: dict[str, str | int]
    """The machine of the client."""
    seconds: float
    interrupted: bool = False
    notes: list[str]
    client: ClientFigures
    all: LoadFigures
    models: dict[str, LoadFigures]
    requests: list[RequestRecord]


def make_result(
    sending: Sending,
    models: Sequence[str],
    objectives: Objectives | None,
    *,
    url: str,
    arguments: Mapping[str, Any],
    notes: Sequence[str],
) -> BenchResult:
    records = sending.records
    told = list(notes)
    uncounted = sum(record.complete and record.output_tokens is None for record in records)
    if uncounted:
        told.append(f"{uncounted} responses had no usage: their pieces are counted as tokens")
    return BenchResult(
        crosspool=crosspool.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        url=url,
        arguments=dict(arguments),
        machine=machine.describe(),
        seconds=sending.seconds,
        interrupted=sending.interrupted,
        notes=told,
        client=ClientFigures(
            lateness=percentiles([record.lateness for record in records]),
            lag=percentiles(sending.lags),
            cpu_s=sending.cpu_s,
        ),
        all=figures(records, sending.seconds, objectives),
        models={
            name: figures([r for r in records if r.model == name], sending.seconds, objectives)
            for name in models
        },
        requests=records,
    )


def write(result: BenchResult, path: Path) -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.encode(result) + b"\n")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}") from None


def read(path: Path) -> BenchResult:
    """Raises ConfigError for a file that no run of this version has written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        result = msgspec.json.decode(content, type=BenchResult)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no result of crosspool bench: {error}") from None
    if result.version != VERSION:
        raise ConfigError(f"{path} has form {result.version}; this version reads {VERSION}")
    return result
