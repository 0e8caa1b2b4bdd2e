"""Estimates a quantile from independent samples, with an interval that assumes no distribution.

Of n independent samples, the number at or below the true q-quantile is Binomial(n, q) for every
distribution, so the order statistics X_(r) <= X_(s) enclose that quantile with
probability at least P(r <= B < s), B ~ Binomial(n, q); exactly so for a continuous distribution.
Source: H. A. David and H. N. Nagaraja, Order Statistics, 3rd edition (Wiley 2003), section 7.1;
also W. Q. Meeker, G. J. Hahn and L. A. Escobar, Statistical Intervals, 2nd edition (Wiley 2017),
chapter 5. The estimate itself is X_(ceil(n * q)), the inverse of the empirical distribution.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from scipy.stats import binom

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats, Ints


class QuantileEstimate(msgspec.Struct, frozen=True):
    """A quantile and the interval in which it lies with probability ``level``."""

    quantile: float
    value: float
    low: float
    """Lower end of the interval; -inf when there are too few samples for one."""
    high: float
    """Upper end of the interval; inf when there are too few samples for one."""
    level: float
    """Nominal coverage of [low, high], 0 to 1; 1 when the value is exact."""

    @classmethod
    def exact(cls, quantile: float, value: float) -> QuantileEstimate:
        return cls(quantile, value, value, value, 1.0)


def check_probability(name: str, value: float) -> None:
    """Raises ConfigError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise ConfigError(f"{name}: {value}; give a number between 0 and 1, such as 0.99")


def ranks(samples: int, quantile: float, level: float) -> tuple[int, int, int]:
    """Returns the ranks (1 is the least) of the interval's lower end, of the estimate and of the
    upper end; 0 means no lower end, and samples + 1 no upper end. On either side the interval
    misses the quantile with probability at most (1 - level) / 2."""
    check_probability("quantile", quantile)
    check_probability("level", level)
    if samples < 1:
        raise ConfigError(f"samples: {samples}; a quantile needs at least one")
    tail = (1 - level) / 2
    low = int(binom.ppf(tail, samples, quantile))
    high = int(binom.isf(tail, samples, quantile)) + 1
    # n * q is not exact in binary: ceil(100 * 0.29) would be 30
    middle = max(1, math.ceil(samples * quantile - 1e-9))
    return low, middle, high


def estimate(values: Floats | Ints, quantile: float, level: float) -> QuantileEstimate:
    """Estimates a quantile from ``values``, [n] independent samples in any order."""
    low, middle, high = ranks(len(values), quantile, level)
    wanted = [rank - 1 for rank in (low, middle, high) if 1 <= rank <= len(values)]
    ordered = np.partition(values, wanted)
    return QuantileEstimate(
        quantile,
        float(ordered[middle - 1]),
        float(ordered[low - 1]) if low >= 1 else -math.inf,
        float(ordered[high - 1]) if high <= len(values) else math.inf,
        level,
    )


def estimate_of_counts(counts: Ints, quantile: float, level: float) -> QuantileEstimate:
    """Estimates a quantile from ``counts``, the numbers of samples with the values 0, 1, 2, ..."""
    below = np.cumsum(counts)
    samples = int(below[-1])
    low, middle, high = ranks(samples, quantile, level)

    def value(rank: int) -> float:
        return float(np.searchsorted(below, rank))

    return QuantileEstimate(
        quantile,
        value(middle),
        value(low) if low >= 1 else -math.inf,
        value(high) if high <= samples else math.inf,
        level,
    )


def scaled(estimate: QuantileEstimate, unit: float) -> QuantileEstimate:
    """Converts an estimate to a unit of which ``unit`` make one of the old."""
    return QuantileEstimate(
        estimate.quantile,
        estimate.value * unit,
        estimate.low * unit,
        estimate.high * unit,
        estimate.level,
    )
