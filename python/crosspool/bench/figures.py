"""Figures of many requests: counts, percentiles, tokens per second, goodput."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from crosspool.bench.record import RequestRecord
from crosspool.config.errors import ConfigError

_LIMIT = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
KEEPS_UP_SECONDS = 0.01
"""A client whose P99 of lateness is above this cannot keep up."""


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Mean, percentiles and maximum of ``n`` values, in seconds; a percentile between two values is
    interpolated."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Returns None where there are no values."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    mean, most = float(np.mean(values)), max(values)
    return Percentiles(n=len(values), mean=mean, p50=p50, p90=p90, p99=p99, max=most)


class Objectives(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Service level objectives of a request, in seconds. None is no limit."""

    ttft: float | None = None
    tbt: float | None = None
    """The longest time between two of its tokens."""
    tpot: float | None = None
    e2e: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        return record.complete and all(
            limit is None or value is None or value <= limit
            for limit, value in (
                (self.ttft, record.ttft),
                (self.tbt, max(record.tbt, default=None)),
                (self.tpot, record.tpot),
                (self.e2e, record.e2e),
            )
        )


def read_objectives(text: str) -> Objectives:
    """Reads ``ttft=2s,tbt=200ms``. Raises ConfigError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        match = _LIMIT.fullmatch(value)
        if name not in Objectives.__struct_fields__ or name in found or match is None:
            raise ConfigError(
                f"--slo {part!r}: write ttft, tbt, tpot or e2e once each, with a time in ms or s, "
                "as in ttft=2s,tbt=200ms"
            )
        found[name] = float(match[1]) / (1000 if match[2] == "ms" else 1)
    return Objectives(**found)


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the requests of one model, or of all."""

    requests: int
    complete: int
    failed: dict[str, int]
    """Failed requests by the kind of failure."""
    prompt_tokens: int
    """Prompt tokens of the complete requests, by the server's count where it gives one."""
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft: Percentiles | None
    tbt: Percentiles | None
    tpot: Percentiles | None
    e2e: Percentiles | None
    good: int | None
    """Requests that met the objectives; None where none were given."""
    goodput_per_s: float | None


def figures(
    records: Sequence[RequestRecord], seconds: float, objectives: Objectives | None
) -> LoadFigures:
    """Returns the figures of ``records``, of a workload that took ``seconds``."""
    complete = [record for record in records if record.complete]
    output = sum(record.tokens for record in complete)
    good = None if objectives is None else sum(map(objectives.met_by, records))
    return LoadFigures(
        requests=len(records),
        complete=len(complete),
        failed=dict(Counter(r.failure for r in records if not r.complete).most_common()),
        prompt_tokens=sum(
            r.wanted_prompt_tokens if r.prompt_tokens is None else r.prompt_tokens for r in complete
        ),
        output_tokens=output,
        requests_per_s=_per(len(complete), seconds),
        output_tokens_per_s=_per(output, seconds),
        ttft=percentiles([r.ttft for r in complete if r.ttft is not None]),
        tbt=percentiles([gap for r in complete for gap in r.tbt]),
        tpot=percentiles([r.tpot for r in complete if r.tpot is not None]),
        e2e=percentiles([r.e2e for r in complete if r.e2e is not None]),
        good=good,
        goodput_per_s=None if good is None else _per(good, seconds),
    )


def _per(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else math.nan
