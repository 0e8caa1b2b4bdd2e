"""What requests ask: lengths of prompts and outputs, and texts where a dataset has them.

======================================= ==========================================================
``random:prompt=512,output=128``        these lengths; with ``range_ratio=R``, from R of them up to
                                        all, uniformly, as ``--random-range-ratio`` of SGLang's
                                        ``bench_serving``
``azure-conversation``, ``azure-code``  lengths drawn from published statistics
a ShareGPT file                         its questions, and the lengths of their answers
any other trace file                    its lengths
======================================= ==========================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.lengths import LONGEST, PUBLISHED, Lengths
from crosspool.planner.traffic.samples import Ints
from crosspool.planner.traffic.sharegpt import ESTIMATED, read_turns, token_counter
from crosspool.planner.traffic.trace_files import detected_format, read_trace

_RANDOM = "random:"
_LEAST_DRAWN = 1000
_FORM = "write random:prompt=TOKENS,output=TOKENS, and range_ratio=R where lengths vary"


@dataclass(frozen=True, eq=False)
class Rows:
    """Requests without their times, one row each."""

    prompt: Ints
    """[n] prompt tokens, at least 1."""
    output: Ints
    """[n] output tokens, at least 1."""
    texts: list[str] | None = None
    """[n] prompts; None where only their lengths are known."""

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, places: Ints) -> Rows:
        texts = None if self.texts is None else [self.texts[place] for place in places.tolist()]
        return Rows(self.prompt[places], self.output[places], texts)

    def scaled(self, factor: float) -> Rows:
        """Returns rows whose lengths are ``factor`` times as long, and at least 1 token. Raises
        ConfigError where prompts are texts, which stay as they are."""
        if factor == 1:
            return self
        if self.texts is not None:
            raise ConfigError("--scale-lengths: the dataset has texts, which cannot be scaled")
        return Rows(_scaled(self.prompt, factor), _scaled(self.output, factor))


def _scaled(tokens: Ints, factor: float) -> Ints:
    scaled: Ints = np.maximum(1, np.rint(tokens * factor)).astype(np.int64)
    return scaled


class Dataset(Protocol):
    """Where rows come from."""

    @property
    def notes(self) -> Sequence[str]:
        """Remarks for the reader of a result."""
        ...

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        """Returns ``count`` rows."""
        ...


@dataclass(frozen=True)
class RandomLengths:
    """Lengths that are the same for all requests, or uniform between a part of that and all."""

    prompt: int
    output: int
    range_ratio: float = 1.0
    notes: Sequence[str] = ()

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        return Rows(self._lengths(self.prompt, count, rng), self._lengths(self.output, count, rng))

    def _lengths(self, full: int, count: int, rng: np.random.Generator) -> Ints:
        least = max(1, int(full * self.range_ratio))
        return rng.integers(least, full, count, dtype=np.int64, endpoint=True)


@dataclass(frozen=True)
class PublishedLengths:
    """Lengths that follow published statistics."""

    law: Lengths
    notes: Sequence[str] = ()

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        return Rows(*self.law.draw(count, rng))


@dataclass(frozen=True, eq=False)
class RecordedRows:
    """Rows of a file in random order; none comes again before all have come."""

    rows: Rows
    notes: Sequence[str] = ()

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        times = math.ceil(count / len(self.rows))
        order = [rng.permutation(len(self.rows)) for _ in range(times)]
        return self.rows.take(np.concatenate(order)[:count].astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How lengths are made to fit the models."""

    scale: float = 1.0
    """Lengths are multiplied by it."""
    context: int | None = None
    """Most tokens of a prompt and its output together; longer requests are left out. None is no
    limit."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"--scale-lengths {self.scale}: must be a number above 0")
        if self.context is not None and self.context < 2:
            raise ConfigError(f"--context {self.context}: must be at least 2 tokens")

    def places(self, rows: Rows) -> Ints:
        """Returns the places of those of the scaled ``rows`` that are short enough. Raises
        ConfigError where none is."""
        if self.context is None:
            return np.arange(len(rows), dtype=np.int64)
        places = np.flatnonzero(rows.prompt + rows.output <= self.context).astype(np.int64)
        if len(rows) and not len(places):
            raise ConfigError(f"--context {self.context}: every request is longer")
        return places

    def note(self, kept: int, of: int) -> tuple[str, ...]:
        """Tells of requests that were left out."""
        if kept == of:
            return ()
        return (f"{of - kept} of {of} requests are longer than {self.context} tokens: left out",)


@dataclass(frozen=True, eq=False)
class FittedDataset:
    """The rows of a dataset without end that fit."""

    dataset: RandomLengths | PublishedLengths
    fit: Fit

    @property
    def notes(self) -> Sequence[str]:
        return self.dataset.notes

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        parts: list[Rows] = []
        while sum(map(len, parts)) < count:
            rows = self.dataset.draw(max(count, _LEAST_DRAWN), rng).scaled(self.fit.scale)
            parts.append(rows.take(self.fit.places(rows)))
        prompt = np.concatenate([part.prompt for part in parts])[:count]
        return Rows(prompt, np.concatenate([part.output for part in parts])[:count])


def read_dataset(text: str, tokenizer: Path | None, fit: Fit) -> Dataset:
    """Reads what ``--dataset`` names. ``tokenizer`` counts the tokens of texts; None estimates
    them. Raises ConfigError."""
    if text.startswith(_RANDOM):
        return FittedDataset(_random(text), fit)
    if text in PUBLISHED:
        return FittedDataset(PublishedLengths(PUBLISHED[text]), fit)
    path = Path(text)
    if not path.is_file():
        raise ConfigError(
            f"--dataset {text!r}: there is no such file; {_FORM}, name a file, or one of "
            + ", ".join(PUBLISHED)
        )
    if detected_format(path) == "sharegpt":
        rows, notes = _conversations(path, tokenizer)
    else:
        trace = read_trace(path)
        rows, notes = Rows(trace.prompt, trace.output), trace.notes
    rows = rows.scaled(fit.scale)
    places = fit.places(rows)
    return RecordedRows(rows.take(places), (*notes, *fit.note(len(places), len(rows))))


def _random(text: str) -> RandomLengths:
    where = f"--dataset {text!r}"
    fields = dict[str, str]()
    for part in text.removeprefix(_RANDOM).split(","):
        name, separator, value = part.partition("=")
        if not separator or name in fields or name not in ("prompt", "output", "range_ratio"):
            raise ConfigError(f"{where}: {part!r}: {_FORM}")
        fields[name] = value
    lengths = []
    for name in ("prompt", "output"):
        value = fields.get(name, "")
        if not value.isdecimal() or not 1 <= int(value) <= LONGEST:
            raise ConfigError(f"{where}: {name} must be from 1 to {LONGEST} tokens; {_FORM}")
        lengths.append(int(value))
    try:
        ratio = float(fields.get("range_ratio", "1"))
    except ValueError:
        ratio = math.nan
    if not 0 <= ratio <= 1:
        raise ConfigError(f"{where}: range_ratio must be a number from 0 to 1")
    return RandomLengths(lengths[0], lengths[1], ratio)


def _conversations(path: Path, tokenizer: Path | None) -> tuple[Rows, tuple[str, ...]]:
    count = token_counter(tokenizer)
    texts: list[str] = []
    prompts, outputs = [], []
    for pairs in read_turns(path, lambda share: None):
        asked, answered = map(list, zip(*pairs, strict=True))
        texts += asked
        prompts.append(count(asked))
        outputs.append(count(answered))
    rows = Rows(np.concatenate(prompts), np.concatenate(outputs), texts)
    return rows, (ESTIMATED,) if tokenizer is None else ()
