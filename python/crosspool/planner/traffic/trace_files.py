"""Reads a trace from a file in one of five formats, which are recognised by their content.

======== ======================================= ================================================
azure    Azure LLM inference traces, CSV         ``TIMESTAMP,ContextTokens,GeneratedTokens``
csv      CSV, columns in any order               ``prompt_tokens,output_tokens`` and, optionally,
                                                 ``arrival,model,service_seconds``
jsonl    the project's own, an object per line   the same five fields
mooncake Mooncake traces, an object per line     ``timestamp`` (ms), ``input_length``,
                                                 ``output_length``
sharegpt ShareGPT, a JSON list                   ``conversations`` of turns with a ``value``
======== ======================================= ================================================

Requests out of order are sorted by arrival, and the first arrival is time 0. Requests without a
prompt token or without an output token are left out. The trace's notes mention both; any other
value that makes no sense is an error.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
from tqdm import tqdm

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.sharegpt import read_sharegpt
from crosspool.planner.traffic.trace import Trace
from crosspool.planner.traffic.trace_columns import (
    JSON_ERRORS,
    Column,
    Field,
    csv_columns,
    jsonl_columns,
)

TraceFormat = Literal["azure", "csv", "jsonl", "mooncake", "sharegpt"]
FORMATS: tuple[str, ...] = get_args(TraceFormat)

_FIELDS: dict[str, tuple[Field, ...]] = {
    "azure": (
        Field("arrival", "TIMESTAMP", "time"),
        Field("prompt", "ContextTokens", "tokens"),
        Field("output", "GeneratedTokens", "tokens"),
    ),
    "mooncake": (
        Field("arrival", "timestamp", "milliseconds"),
        Field("prompt", "input_length", "tokens"),
        Field("output", "output_length", "tokens"),
    ),
    "jsonl": (
        Field("arrival", "arrival", "seconds", optional=True),
        Field("model", "model", "text", optional=True),
        Field("prompt", "prompt_tokens", "tokens"),
        Field("output", "output_tokens", "tokens"),
        Field("service", "service_seconds", "duration", optional=True),
    ),
}
_FIELDS["csv"] = _FIELDS["jsonl"]
_HEAD_BYTES = 1 << 16


def read_trace(
    path: Path,
    trace_format: TraceFormat | None = None,
    *,
    tokenizer: Path | None = None,
    progress: bool | None = None,
) -> Trace:
    """Reads a trace. A ``trace_format`` of None is recognised by the content. ``tokenizer`` counts
    the tokens of ShareGPT's texts; None estimates them from the number of characters. ``progress``
    shows a bar on stderr; None does so on a terminal when the file takes more than a moment. Raises
    ConfigError that names file, line and field."""
    size = _size(path)
    name = trace_format or detected_format(path)
    if name not in FORMATS:
        raise ConfigError(f"trace format {name!r}: must be one of {', '.join(FORMATS)}")
    slow = size > (16 << 20 if tokenizer is None else 1 << 20)
    shown = progress if progress is not None else sys.stderr.isatty() and slow
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=not shown) as bar:
        if name == "sharegpt":
            return read_sharegpt(path, tokenizer, lambda part: bar.update(part * size))
        read = csv_columns if name in ("azure", "csv") else jsonl_columns
        columns = read(path, _FIELDS[name], bar.update)
    if not columns or not len(columns["prompt"]):
        raise ConfigError(f"{path}: has no requests")
    return _cleaned(path, columns)


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read: {error.strerror}") from None
    if not size:
        raise ConfigError(f"{path}: is empty")
    return size


def detected_format(path: Path) -> str:
    """Returns the name of the file's format. Raises ConfigError when it is none of them, or cannot
    be read."""
    _size(path)
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    line = head.split(b"\n", 1)[0]
    if head.startswith(b"["):
        return "sharegpt"
    if head.startswith(b"{"):
        try:
            fields = set(msgspec.json.decode(line))
        except JSON_ERRORS as error:
            raise ConfigError(f"{path}:1: is not valid JSON: {error}") from None
    else:
        fields = {name.strip(' "\r') for name in line.decode(errors="replace").split(",")}
    for name in ("mooncake", "jsonl") if head.startswith(b"{") else ("azure", "csv"):
        if fields >= {column.name for column in _FIELDS[name] if not column.optional}:
            return name
    shown = line[:80].decode(errors="replace").strip()
    raise ConfigError(
        f"{path}:1: {shown!r} is not the beginning of a trace: it must be a CSV header with "
        "TIMESTAMP,ContextTokens,GeneratedTokens or prompt_tokens,output_tokens, a JSON object "
        "with timestamp, input_length, output_length or with prompt_tokens, output_tokens, or a "
        "JSON list of conversations"
    )


def _cleaned(path: Path, columns: dict[str, Column]) -> Trace:
    notes = []
    arrival = columns.get("arrival")
    if arrival is not None and arrival.dtype == np.int64:
        arrival = (arrival - arrival.min()) / 1e9
    trace = Trace(
        prompt=columns["prompt"],
        output=columns["output"],
        arrival=arrival,
        service=columns.get("service"),
        model=columns.get("model"),
    )
    usable = (trace.prompt > 0) & (trace.output > 0)
    if left_out := len(trace) - int(usable.sum()):
        notes.append(
            f"{left_out} of {len(trace)} requests have no prompt or no output and are left out"
        )
        trace = trace.take(usable)
    if not len(trace):
        raise ConfigError(f"{path}: no request has both a prompt token and an output token")
    if trace.arrival is not None and (backwards := int((np.diff(trace.arrival) < 0).sum())):
        notes.append(f"arrival times went backwards {backwards} times and were sorted")
        trace = trace.take(np.argsort(trace.arrival, kind="stable"))
    if trace.arrival is not None:
        trace = replace(trace, arrival=trace.arrival - trace.arrival[0])
    return replace(trace, notes=tuple(notes))
