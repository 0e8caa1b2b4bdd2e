"""Compares ranks of order statistics with the binomial law, and coverage over many seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.quantile import estimate, estimate_of_counts, ranks
from scipy.stats import binom, expon


@pytest.mark.parametrize("samples", [1, 10, 299, 5000])
@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_ranks_are_the_narrowest_with_that_much_in_each_tail(
    samples: int, quantile: float, level: float
) -> None:
    low, middle, high = ranks(samples, quantile, level)
    tail = (1 - level) / 2
    below = binom(samples, quantile).cdf
    assert 0 <= low <= middle <= high <= samples + 1
    # X_(low) lies above the quantile when fewer than low samples lie below it
    assert below(low - 1) <= tail < below(low) + 1e-12
    assert 1 - below(high - 1) <= tail + 1e-12
    assert 1 - below(high - 2) > tail


def test_a_known_interval() -> None:
    """The median of 10 samples: X_(2)..X_(9) covers it with probability 97.9 % (David and
    Nagaraja's classical example: 1 - 2 * 11 / 1024)."""
    assert ranks(10, 0.5, 0.95) == (2, 5, 9)
    assert binom.cdf(8, 10, 0.5) - binom.cdf(1, 10, 0.5) == pytest.approx(1 - 2 * 11 / 1024)


def test_value_and_ends_are_order_statistics() -> None:
    values = np.random.default_rng(0).permutation(1000)
    found = estimate(values, 0.9, 0.95)
    low, middle, high = ranks(1000, 0.9, 0.95)
    assert (found.value, found.low, found.high) == (middle - 1, low - 1, high - 1)
    assert found.value == 899


def test_counts_are_the_same_as_samples() -> None:
    values = np.random.default_rng(0).poisson(3.0, 5000)
    for quantile in (0.01, 0.5, 0.99, 0.9999):
        assert estimate_of_counts(np.bincount(values), quantile, 0.9) == estimate(
            values, quantile, 0.9
        )


def test_too_few_samples_leave_an_end_open() -> None:
    found = estimate(np.arange(50), 0.99, 0.95)
    assert found.high == math.inf and found.value == 49
    assert estimate(np.arange(50), 0.01, 0.95).low == -math.inf


@pytest.mark.parametrize(("samples", "quantile", "level"), [(400, 0.95, 0.9), (3000, 0.99, 0.95)])
def test_covers_the_truth_at_its_nominal_rate(samples: int, quantile: float, level: float) -> None:
    truth = expon.ppf(quantile)
    seeds = 200
    covered = 0
    for seed in range(seeds):
        found = estimate(np.random.default_rng(seed).exponential(size=samples), quantile, level)
        covered += found.low <= truth <= found.high
    low, _, high = ranks(samples, quantile, level)
    nominal = binom.cdf(high - 1, samples, quantile) - binom.cdf(low - 1, samples, quantile)
    assert level <= nominal < level + 0.05
    least, most = binom.interval(0.999, seeds, nominal)
    assert least <= covered <= most


@pytest.mark.parametrize("wrong", [0.0, 1.0, 99.0, -0.1, math.nan])
def test_a_quantile_is_a_probability(wrong: float) -> None:
    with pytest.raises(ConfigError, match="quantile"):
        ranks(10, wrong, 0.95)
    with pytest.raises(ConfigError, match="level"):
        ranks(10, 0.5, wrong)
