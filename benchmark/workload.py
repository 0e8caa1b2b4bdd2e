"""Requests to replay: their arrival times, models and lengths."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from crosspool.models.registry import read_model

from benchmark.server import DEMO, TINY_MODELS

FORCE = 100.0
"""A logit bias that no logit outweighs."""
_ORDINARY = 300
"""First token id of the bundled models that is neither special nor a single byte."""


@dataclass(frozen=True)
class Request:
    """One request of a load."""

    arrival: float
    """Seconds after the load's start."""
    model: str
    prompt: list[int]
    """Token ids."""
    max_tokens: int
    """Output tokens that the request asks for, and so what admission may promise."""
    stop_after: int | None = None
    """Tokens after which the model ends by itself, the end-of-sequence token included. None: it
    never does, and ``max_tokens`` are generated."""
    eos: int = 0
    """The model's end-of-sequence token, where ``stop_after`` is given."""

    @property
    def output_tokens(self) -> int:
        """Number of tokens of a complete output."""
        return self.max_tokens if self.stop_after is None else self.stop_after

    def sampling(self) -> dict[str, Any]:
        """Return SGLang's sampling parameters. They make the output's length exact: the
        end-of-sequence token is barred before ``stop_after`` and forced there."""
        common = {"temperature": 0.0, "max_new_tokens": self.max_tokens}
        if self.stop_after is None or self.stop_after >= self.max_tokens:
            return {**common, "ignore_eos": True}
        return {
            **common,
            "min_new_tokens": self.stop_after - 1,
            "logit_bias": {str(self.eos): FORCE},
        }


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw arrival times in [0, seconds) of a Poisson process of ``rate`` per second, ascending."""
    count = rng.poisson(rate * seconds)
    return np.sort(rng.uniform(0.0, seconds, count))


def random_prompt(length: int, vocab: int, rng: np.random.Generator) -> list[int]:
    """Draw ordinary token ids, in an order that no other prompt shares."""
    return [int(token) for token in rng.integers(_ORDINARY, vocab, length)]


@functools.cache
def eos_tokens() -> dict[str, int]:
    """An end-of-sequence token of each bundled model."""
    return {name: read_model(DEMO / name).eos_token_ids[0] for name in TINY_MODELS}
