"""Histograms as prometheus_client writes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from crosspool.observability.histograms import Histogram


def add_histogram(
    family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram
) -> None:
    """Adds a histogram under its labels, unless it has no values: of the many models that a server
    may have, most have none."""
    if not histogram.count:
        return
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    below = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
    family.add_metric(labels, below, histogram.sum)
