"""Reads columns of numbers from a text file in blocks. A block is checked as a whole, and line by
line only to name the line that is wrong."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size
from crosspool.planner.traffic.lengths import LONGEST

Kind = Literal["tokens", "seconds", "milliseconds", "duration", "time", "text"]
Column = Any
"""An int64 array for tokens and for times (in ns), a float64 array of seconds otherwise; a list of
str for text."""
BLOCK_BYTES = 4 << 20
JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Exceptions of decoding JSON from outside."""
_LONGEST_SECONDS = 1e10


@dataclass(frozen=True)
class Field:
    """One column: its meaning to the planner, its name in the file, and how values are written."""

    meaning: Literal["arrival", "prompt", "output", "service", "model"]
    name: str
    kind: Kind
    optional: bool = False


@dataclass
class Columns:
    """The columns of a file; their blocks are joined at the end."""

    parts: dict[str, list[Column]] = field(default_factory=dict)

    def add(self, column: Field, values: Column) -> None:
        self.parts.setdefault(column.meaning, []).append(values)

    def joined(self) -> dict[str, Column]:
        return {
            meaning: list(chain.from_iterable(parts))
            if isinstance(parts[0], list)
            else np.concatenate(parts)
            for meaning, parts in self.parts.items()
        }


def blocks(file: Path, progress: Callable[[int], object]) -> Iterator[tuple[int, bytes]]:
    """Yields whole lines in blocks of about :data:`BLOCK_BYTES`, each with the number of its first
    line, and calls ``progress`` with the bytes just read. Raises ConfigError for a line longer than
    a block."""
    line, rest = 1, b""
    with file.open("rb") as stream:
        while data := stream.read(BLOCK_BYTES):
            progress(len(data))
            end = data.rfind(b"\n") + 1
            if not end:
                rest += data
                if len(rest) > BLOCK_BYTES:
                    raise ConfigError(
                        f"{file}:{line}: the line is longer than {format_size(BLOCK_BYTES)}"
                    )
                continue
            block, rest = rest + data[:end], data[end:]
            yield line, block.removeprefix(b"\xef\xbb\xbf") if line == 1 else block
            line += block.count(b"\n")
        if rest:
            yield line, rest.removeprefix(b"\xef\xbb\xbf") if line == 1 else rest


def csv_columns(
    file: Path, fields: Sequence[Field], progress: Callable[[int], object]
) -> dict[str, Column]:
    """Reads the columns of a CSV file with a header, by meaning; its other columns are ignored."""
    columns = Columns()
    places: list[tuple[Field, int]] = []
    width = 0
    for first, block in blocks(file, progress):
        start, lines = first, _text(file, first, block).split("\n")
        if not places:
            header = [name.strip() for name in next(csv.reader(lines[:1]))]
            present = _present(file, 1, fields, header)
            places, width = [(column, header.index(column.name)) for column in present], len(header)
            start, lines = 2, lines[1:]
        try:
            rows = [row for row in csv.reader(lines) if row]
            if set(map(len, rows)) - {width}:
                raise ValueError("a row of another length")
            cells = list(zip(*rows, strict=True)) or [()] * width
            for column, place in places:
                columns.add(column, _column(column.kind, cells[place]))
        except (ValueError, OverflowError, csv.Error) as error:
            _find_in_csv(file, start, lines, places, width)
            raise AssertionError(f"{file}: no wrong line found") from error
    return columns.joined()


def jsonl_columns(
    file: Path, fields: Sequence[Field], progress: Callable[[int], object]
) -> dict[str, Column]:
    """Reads the columns of a file with a JSON object per line, by meaning. The first line decides
    which optional fields are read; other fields are ignored."""
    columns = Columns()
    present: list[Field] = []
    decoder: msgspec.json.Decoder[Any] | None = None
    for first, block in blocks(file, progress):
        if decoder is None and block.strip():
            head = block.lstrip().split(b"\n", 1)[0]
            line = first + block[: block.index(head)].count(b"\n")
            present = _present(file, line, fields, list(_object(file, line, head)))
            row = msgspec.defstruct("Row", [(c.name, _json_type(c.kind)) for c in present])
            decoder = msgspec.json.Decoder(row)
        if decoder is None:
            continue
        try:
            rows = decoder.decode_lines(block)
            for column in present:
                columns.add(column, _column(column.kind, map(attrgetter(column.name), rows)))
        except (ValueError, OverflowError, *JSON_ERRORS) as error:
            _find_in_jsonl(file, first, block, present)
            raise AssertionError(f"{file}: no wrong line found") from error
    return columns.joined()


def _text(file: Path, first: int, block: bytes) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        line = first + block[: error.start].count(b"\n")
        raise ConfigError(f"{file}:{line}: is not UTF-8 text") from None


def _present(file: Path, line: int, fields: Sequence[Field], names: list[str]) -> list[Field]:
    for column in fields:
        if column.name not in names and not column.optional:
            raise ConfigError(f"{file}:{line}: {column.name} is missing; the line has {names}")
    return [column for column in fields if column.name in names]


def _json_type(kind: Kind) -> Any:
    return {"tokens": int, "text": str}.get(kind, float)


def _column(kind: Kind, values: Any) -> Column:
    """Converts a whole column at once. Raises ValueError or OverflowError for any wrong value."""
    if kind == "text":
        return list(values)
    if kind == "tokens":
        tokens = np.fromiter(map(int, values), dtype=np.int64)
        _require((tokens >= 0) & (tokens <= LONGEST))
        return tokens
    if kind == "time":
        stamps = [value.removesuffix("+00:00").removesuffix("Z") for value in values]
        if not all(stamp.count("-") == 2 and "+" not in stamp for stamp in stamps):
            raise ValueError("not a date, or another time zone")
        times = np.array(stamps, dtype="datetime64[ns]")
        _require(~np.isnat(times))
        return times.astype(np.int64)
    seconds = np.fromiter(map(float, values), dtype=np.float64)
    if kind == "milliseconds":
        seconds = seconds / 1000
    _require((seconds > 0 if kind == "duration" else seconds >= 0) & (seconds <= _LONGEST_SECONDS))
    return seconds


def _require(valid: np.ndarray) -> None:
    if not valid.all():
        raise ValueError("out of range")


def _fault(kind: Kind, value: Any) -> str | None:
    """Says what is wrong with one value; None when nothing is."""
    try:
        _column(kind, [value])
        return None
    except (ValueError, OverflowError, TypeError, AttributeError):
        pass
    if kind == "time":
        return "is not a UTC time such as 2023-11-16 18:15:46.68"
    try:
        number = int(value) if kind == "tokens" else float(value)
    except (ValueError, TypeError):
        return "is not a whole number" if kind == "tokens" else "is not a number"
    if math.isnan(number):
        return "is not a number"
    if number < 0:
        return "is negative"
    if kind == "duration" and number == 0:
        return "must be above 0"
    return (
        f"is more than {LONGEST} tokens"
        if kind == "tokens"
        else f"is more than {_LONGEST_SECONDS:g} seconds"
    )


def _json_fault(kind: Kind, value: Any) -> str | None:
    """Says what is wrong with one JSON value or its type; None when nothing is."""
    if kind == "text":
        return None if isinstance(value, str) else "is not a string"
    if isinstance(value, bool | str) or (kind == "tokens" and not isinstance(value, int)):
        return "is not a whole number" if kind == "tokens" else "is not a number"
    return _fault(kind, value)


def _find_in_csv(
    file: Path, first: int, lines: list[str], places: list[tuple[Field, int]], width: int
) -> None:
    """Raises the ConfigError of the first wrong line."""
    for number, line in enumerate(lines, first):
        try:
            row = next(csv.reader([line], strict=True), [])
        except csv.Error as error:
            raise ConfigError(f"{file}:{number}: {error}") from None
        if row and len(row) != width:
            raise ConfigError(f"{file}:{number}: {len(row)} fields, where the header has {width}")
        for column, place in places:
            if row and (fault := _fault(column.kind, row[place])):
                raise ConfigError(f"{file}:{number}: {column.name}: {_shown(row[place])} {fault}")


def _find_in_jsonl(file: Path, first: int, block: bytes, present: list[Field]) -> None:
    """Raises the ConfigError of the first wrong line."""
    for number, line in enumerate(block.split(b"\n"), first):
        if not line.strip():
            continue
        values = _object(file, number, line)
        for column in present:
            if column.name not in values:
                raise ConfigError(f"{file}:{number}: {column.name} is missing")
            value = values[column.name]
            fault = _json_fault(column.kind, value)
            if fault:
                raise ConfigError(f"{file}:{number}: {column.name}: {_shown(value)} {fault}")


def _object(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(line)
    except JSON_ERRORS as error:
        raise ConfigError(f"{file}:{number}: is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}:{number}: must be a JSON object")
    return values


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
