"""Popularity of models: each one's share of the requests, most popular first.

Example::

    openrouter(30)[:3]  # the shares of the three most popular of thirty models
    read_popularity("zipf:1.1", 30), read_popularity("0.5,0.3,0.2", 3)
"""

from __future__ import annotations

import math

import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats

OPENROUTER_ALPHA = 1.32
"""Exponent of Zipf's law. With 330 models it leaves 16.3 % of the requests to the least popular
90 % of them; the CrossPool paper (arXiv 2606.24506) reports 16.5 % of the tokens on OpenRouter."""


def zipf(models: int, alpha: float) -> Floats:
    """Returns [models] shares in proportion to ``rank ** -alpha``, which sum to 1; an alpha of 0
    makes them equal. Raises ConfigError."""
    if models < 1:
        raise ConfigError(f"popularity: {models} models: must be at least 1")
    if not (math.isfinite(alpha) and 0 <= alpha <= 100):
        raise ConfigError(f"popularity: alpha {alpha}: must be between 0 and 100")
    weights = np.arange(1, models + 1, dtype=np.float64) ** -alpha
    shares: np.ndarray = weights / weights.sum()
    return shares


def openrouter(models: int) -> Floats:
    """Returns [models] shares like those of the models on OpenRouter."""
    return zipf(models, OPENROUTER_ALPHA)


def given(weights: Floats) -> Floats:
    """Returns shares in proportion to the weights. Raises ConfigError."""
    if len(weights) == 0 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ConfigError("popularity: the weights must be finite numbers of at least 0")
    if not weights.sum() > 0:
        raise ConfigError("popularity: all weights are 0: at least one must be above 0")
    shares: np.ndarray = weights / weights.sum()
    return shares


def read_popularity(text: str, models: int) -> Floats:
    """Reads [models] shares from ``openrouter``, ``uniform``, ``zipf:ALPHA``, or a weight for each
    model, separated by commas. Raises ConfigError."""
    if text == "openrouter":
        return openrouter(models)
    if text == "uniform":
        return zipf(models, 0.0)
    try:
        if text.startswith("zipf:"):
            return zipf(models, float(text.removeprefix("zipf:")))
        weights = np.array([float(weight) for weight in text.split(",")])
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(
            f"popularity {text!r}: must be openrouter, uniform, zipf:ALPHA, or weights such as "
            "0.5,0.3,0.2"
        ) from None
    if len(weights) != models:
        raise ConfigError(
            f"popularity {text!r}: {len(weights)} weights for {models} models: give one for each"
        )
    return given(weights)
