"""Histograms against numpy's quantiles of the values themselves, and what lies between two looks at
one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from crosspool.observability.histograms import SECONDS, TOKENS, Histogram


def filled(values: np.ndarray) -> Histogram:
    histogram = Histogram.of(SECONDS)
    for value in values:
        histogram.observe(float(value))
    return histogram


def test_the_bounds_ascend_from_milliseconds_to_minutes() -> None:
    assert SECONDS[0] == 0.0005 and SECONDS[-1] == 600.0
    assert max(len(f"{bound:g}") for bound in SECONDS) == len("0.0005")
    assert all(float(f"{bound:g}") == bound for bound in SECONDS)
    assert all(low < high <= 2 * low for low, high in pairwise(SECONDS))
    assert (TOKENS[0], TOKENS[-1]) == (1.0, 262144.0)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_lies_in_the_bucket_of_the_true_one(share: float) -> None:
    values = np.random.default_rng(7).lognormal(-4, 1.5, 2000)
    true = np.quantile(values, share, method="inverted_cdf")
    estimate = filled(values).quantile(share)
    assert estimate is not None
    bucket = int(np.searchsorted(SECONDS, true))
    assert (SECONDS[bucket - 1] if bucket else 0) <= estimate <= SECONDS[bucket]


def test_count_and_sum_are_those_of_the_values() -> None:
    values = np.random.default_rng(8).exponential(1.0, 500)
    histogram = filled(values)
    assert histogram.count == 500
    assert histogram.sum == pytest.approx(values.sum())


def test_values_above_all_bounds_count_and_are_taken_for_the_last_bound() -> None:
    histogram = filled(np.array([5000.0]))
    assert (histogram.count, histogram.quantile(0.5)) == (1, 600.0)
    assert Histogram.of(SECONDS).quantile(0.5) is None


def test_what_came_since_an_earlier_look() -> None:
    earlier, further = np.full(9, 0.0015), np.full(4, 0.25)
    before = filled(earlier)
    now = filled(np.concatenate([earlier, further]))
    assert now.since(before) == filled(further)
    assert now.since(None) is now
    assert before.since(now) is before  # the scheduler counts anew
    assert before.plus(filled(further)).counts == now.counts
