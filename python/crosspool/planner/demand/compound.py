"""The law of demand at a random time under stationary Poisson arrivals, without sampling.

With Poisson arrivals a random time finds Poisson(a) active requests of a model, a = rate * E[T]
(M/G/infinity). Each is a sample drawn with weight T and a uniform share v of its time, and holds
P = ceil((O_p + O_d * v) / page_size) pages. With f the law of P, the model's pages are compound
Poisson with the transform exp(a * (f^ - 1)). A model's pages are rounded up to chunks, and the law
of the pool's chunks is the convolution of its models' laws. FFTs compute all of it, to about 1e-12
in probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft, signal

from crosspool.planner.demand.kv_model import Charge, KVLoad, KVModel, kv_loads
from crosspool.planner.demand.quantile import QuantileEstimate, check_probability
from crosspool.planner.traffic.samples import Floats, Ints, Traffic

_LOST = 1e-13
"""Most probability that may lie beyond the end of an array."""


@dataclass(frozen=True, eq=False)
class ExactDemand:
    """Pool demand at a random time: the laws of the pool's chunks and of each model's chunks."""

    chunk_bytes: int
    charge: Charge
    pool: Floats
    """[k] probabilities that the pool needs 0, 1, 2, ... chunks."""
    models: tuple[Floats, ...]
    """Per model, [k] probabilities that it needs 0, 1, 2, ... chunks."""

    def quantile(self, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Quantile of the pool's demand, in bytes of whole chunks; exact, whatever ``level``."""
        return QuantileEstimate.exact(quantile, self.chunk_bytes * _quantile(self.pool, quantile))

    def model_quantile(self, model: int, quantile: float, level: float = 0.95) -> QuantileEstimate:
        """Quantile of one model's demand, in bytes of whole chunks."""
        law = self.models[model]
        return QuantileEstimate.exact(quantile, self.chunk_bytes * _quantile(law, quantile))

    def exceeds(self, nbytes: float) -> float:
        """Probability that demand exceeds ``nbytes`` at a random time."""
        return float(self.pool[int(nbytes // self.chunk_bytes) + 1 :].sum())

    @property
    def mean(self) -> float:
        """Mean demand, in bytes."""
        return float(self.pool @ np.arange(len(self.pool))) * self.chunk_bytes


def exact_demand(
    traffic: Traffic,
    kv_models: Sequence[KVModel],
    charge: Charge = "active",
    *,
    chunk_bytes: int,
) -> ExactDemand:
    """Computes demand from the rates and samples of ``traffic``; arrival times are ignored. Raises
    ConfigError when traffic and models do not belong together."""
    models = tuple(
        _trimmed(chunk_law(load, charge)) for load in kv_loads(traffic, kv_models, chunk_bytes)
    )
    return ExactDemand(chunk_bytes, charge, convolution(models), models)


def request_law(load: KVLoad, charge: Charge) -> Floats:
    """Returns [k] probabilities that a request which is active at a random time holds 0, 1, 2, ...
    pages.

    P(P <= k) = sum_r w_r * clip((k - first_r) / growth_r, 0, 1), w_r = T_r / sum T. This is a sum
    of hinges: every sample adds a slope of w / growth between ``first`` and ``first + growth``."""
    weight = load.samples.service / load.samples.service.sum()
    pages = load.pages(charge)
    if charge == "promised":
        return _weights(pages.first.astype(np.int64), weight)
    begin, end = pages.first, pages.first + pages.growth
    slope = weight / pages.growth
    size = int(np.ceil(end.max())) + 1

    def sums(values: Floats) -> Floats:
        change = np.bincount(np.ceil(begin).astype(np.int64), weights=values, minlength=size)
        change -= np.bincount(np.ceil(end).astype(np.int64), weights=values, minlength=size)
        return np.cumsum(change)

    past = np.bincount(np.ceil(end).astype(np.int64), weights=weight, minlength=size)
    below = sums(slope) * np.arange(size) - sums(slope * begin) + np.cumsum(past)
    law = np.maximum(np.diff(below, prepend=0.0), 0)
    scaled: np.ndarray = law / law.sum()
    return scaled


def chunk_law(load: KVLoad, charge: Charge) -> Floats:
    """Returns [k] probabilities that the model needs 0, 1, 2, ... chunks at a random time."""
    if load.active == 0:
        return np.ones(1)
    pages = compound_poisson(load.active, request_law(load, charge))
    chunks = load.layout.chunks_for(np.arange(len(pages), dtype=np.int64))
    return _weights(chunks, pages)


def compound_poisson(mean: float, law: Floats) -> Floats:
    """Returns [k] the law of the sum of Poisson(mean) independent values with the law ``law``, [j]
    over 0, 1, 2, ...

    The array ends where Chernoff's bound, P(S >= x) <= exp(mean * (E[e^(h P)] - 1) - h * x) for
    every h > 0, is small enough, so that what the FFT folds back does not matter."""
    values = np.flatnonzero(law)
    scales = np.geomspace(1e-3, 30, 32) / max(1.0, values[-1])
    logs = mean * (np.exp(np.outer(scales, values)) @ law[values] - 1)
    reach = float(np.min((logs - np.log(_LOST)) / scales))
    size = fft.next_fast_len(max(int(reach), len(law)) + 2, real=True)
    found = fft.irfft(np.exp(mean * (fft.rfft(law, size) - 1)), size)
    found = np.maximum(found, 0)
    scaled: np.ndarray = found / found.sum()
    return scaled


def convolution(laws: Sequence[Floats]) -> Floats:
    """Returns the law of the sum of independent values that have these laws."""
    left = sorted((_trimmed(law) for law in laws), key=len)
    if not left:
        return np.ones(1)
    while len(left) > 1:
        pairs = [left[i : i + 2] for i in range(0, len(left), 2)]
        left = [
            _trimmed(np.maximum(signal.convolve(*pair), 0)) if len(pair) == 2 else pair[0]
            for pair in pairs
        ]
    scaled: np.ndarray = left[0] / left[0].sum()
    return scaled


def _weights(values: Ints, weights: Floats) -> Floats:
    """Returns [k] total weights of the values 0, 1, 2, ..."""
    return np.bincount(values, weights=weights).astype(np.float64, copy=False)


def _trimmed(law: Floats) -> Floats:
    """Cuts off the end that holds next to no probability."""
    above = np.cumsum(law[::-1])[::-1]
    return law[: max(1, int(np.searchsorted(-above, -_LOST)))]


def _quantile(law: Floats, quantile: float) -> int:
    """Returns the least value with P(X <= value) >= quantile."""
    check_probability("quantile", quantile)
    return int(np.searchsorted(np.cumsum(law), quantile - _LOST))
