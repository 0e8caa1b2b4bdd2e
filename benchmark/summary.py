"""Summaries of many values by a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Median and 99th percentile of ``n`` values; both None when there are none."""

    n: int
    median: float | None
    p99: float | None


def summarise(values: Sequence[float]) -> Summary:
    if not len(values):
        return Summary(0, None, None)
    return Summary(len(values), quantile(values, 0.5), quantile(values, 0.99))


def quantile(values: Sequence[float], q: float) -> float:
    """Return the smallest value that at least a share ``q`` of all values do not exceed. It is one
    that occurred, so a tail is never interpolated between a spike and the values below it."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), q, method="inverted_cdf"))
