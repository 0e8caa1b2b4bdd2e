"""What a check tells: rows of JSON in a file, each flushed at once, so that a check that is killed
leaves everything that it knew."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any, NoReturn


class Gravity(enum.StrEnum):
    """How bad a finding is, the worst first: the page lists findings in this order."""

    WRONG = "wrong result"
    HANG = "does not end"
    CRASH = "crash"
    REFUSED = "refused"
    ERROR = "error"
    WAITS = "waits"
    NOTE = "note"

    @property
    def rank(self) -> int:
        return list(Gravity).index(self)

    @property
    def is_wrong(self) -> bool:
        """Whether a check that found this has not passed."""
        return self.rank <= Gravity.ERROR.rank


READ_FIRST = {
    Gravity.WRONG: ".jsonl",
    Gravity.HANG: ".stacks.txt",
    Gravity.CRASH: ".stacks.txt",
    Gravity.REFUSED: ".jsonl",
    Gravity.ERROR: ".log",
    Gravity.WAITS: ".jsonl",
    Gravity.NOTE: ".jsonl",
}
"""Ending of the file that shows most of a finding."""


class Skipped(Exception):
    """A check cannot run here; the message says what it needs."""


class Notes:
    """The rows of one check. Each has one of these keys:

    - ``fact``: the name of a ``value``;
    - ``finding``: a :class:`Gravity`, with ``what`` and where (``model``, ``stage``, ``layer``,
      ``bucket``, ``lane``);
    - ``headline``: the name of a figure for the page's first table, ``value`` and ``unit``;
    - ``measured``: a row of a benchmark;
    - ``at``: what the check does from now on, for the report of a hang or a crash;
    - ``skipped``: why the check did not run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8")

    def fact(self, name: str, value: object, **more: object) -> None:
        self._write({"fact": name, "value": value} | more)

    def finding(self, gravity: Gravity, what: str, **where: object) -> None:
        self._write({"finding": gravity.value, "what": what} | where)

    def headline(self, name: str, value: float, unit: str) -> None:
        self._write({"headline": name, "value": value, "unit": unit})

    def measured(self, row: dict[str, Any]) -> None:
        self._write({"measured": row})

    def at(self, what: str, **where: object) -> None:
        self._write({"at": what} | where)

    def skipped(self, why: str) -> None:
        self._write({"skipped": why})

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, default=str) + "\n")
        self._file.flush()


def skip(why: str) -> NoReturn:
    """Ends a check that cannot run here."""
    raise Skipped(why)


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a check's rows; the last line may be cut off where the check was killed."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def place(row: dict[str, Any]) -> str:
    """Words for where a finding or an ``at`` row is: model, stage, layer, bucket, lane."""
    words = [str(row[key]) for key in ("model", "stage") if key in row]
    words += [f"{key} {row[key]}" for key in ("layer", "bucket", "lane", "step") if key in row]
    return ", ".join(words)
