"""Lengths of requests: joint samples of prompt and output tokens, drawn from statistics.

Example::

    azure = Lengths(prompt=lognormal(mean=1155, sigma=0.985), output=lognormal(mean=211, p50=151))
    prompt, output = azure.draw(1000, np.random.default_rng(0))
    Lengths(prompt=fixed(512), output=read_length("mean=128,sigma=0.5"))
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats, Ints

LONGEST = 10_000_000
"""Most tokens of a prompt or an output; more is taken for a mistake."""


class LogNormal(msgspec.Struct, frozen=True, kw_only=True):
    """A length of ``exp(mu + sigma z)`` tokens with z standard normal, so that a sigma of 0 gives
    a fixed length. Lengths are rounded to whole tokens and clipped to 1 and ``longest``."""

    mu: float
    sigma: float
    longest: int = LONGEST

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and 0 <= self.sigma <= 10):
            raise ConfigError(f"length: sigma {self.sigma}: must be between 0 and 10")
        if not (math.isfinite(self.mu) and 0 <= self.mu <= math.log(LONGEST)):
            raise ConfigError(f"length: the median must be between 1 and {LONGEST} tokens")
        if not 1 <= self.longest <= LONGEST:
            raise ConfigError(f"length: longest {self.longest}: must be between 1 and {LONGEST}")

    @property
    def mean(self) -> float:
        """Mean length in tokens, before rounding and clipping."""
        return math.exp(self.mu + self.sigma**2 / 2)

    def at(self, z: Floats) -> Ints:
        """Returns [n] lengths in tokens for [n] standard normal values."""
        tokens = np.exp(np.minimum(self.mu + self.sigma * z, math.log(LONGEST)))
        return np.clip(np.rint(tokens), 1, self.longest).astype(np.int64)


def fixed(tokens: int) -> LogNormal:
    """Returns the law of a fixed length. Raises ConfigError."""
    if not 1 <= tokens <= LONGEST:
        raise ConfigError(f"length: {tokens} tokens: must be between 1 and {LONGEST}")
    return LogNormal(mu=math.log(tokens), sigma=0.0)


def lognormal(
    *,
    mean: float | None = None,
    p50: float | None = None,
    sigma: float | None = None,
    longest: int = LONGEST,
) -> LogNormal:
    """Returns the law with any two of its mean, its median and its sigma. Raises ConfigError."""
    for name, value in (("mean", mean), ("p50", p50)):
        if value is not None and not 1 <= value <= LONGEST:
            raise ConfigError(f"length: {name} {value}: must be between 1 and {LONGEST}")
    if p50 is not None and sigma is not None and mean is None:
        return LogNormal(mu=math.log(p50), sigma=sigma, longest=longest)
    if mean is not None and sigma is not None and p50 is None:
        return LogNormal(mu=math.log(mean) - sigma**2 / 2, sigma=sigma, longest=longest)
    if mean is not None and p50 is not None and sigma is None:
        if mean < p50:
            raise ConfigError(f"length: mean {mean}: must be at least the median, {p50}")
        spread = math.sqrt(2 * math.log(mean / p50))
        return LogNormal(mu=math.log(p50), sigma=spread, longest=longest)
    raise ConfigError("length: give two of mean, p50 and sigma")


def read_length(text: str) -> LogNormal:
    """Reads ``512``, or ``mean=1155,sigma=0.985,longest=8192`` with two of mean, p50 and sigma.
    Raises ConfigError."""
    try:
        if "=" not in text:
            return fixed(int(text))
        fields = dict(part.split("=") for part in text.split(","))
        longest = int(fields.pop("longest", LONGEST))
        values = {name.strip(): float(value) for name, value in fields.items()}
    except ConfigError:
        raise
    except ValueError:
        values = {"": 0.0}
    if values.keys() - {"mean", "p50", "sigma"}:
        raise ConfigError(
            f"length {text!r}: must be a number of tokens, or two of mean=, p50= and sigma= "
            "separated by a comma, and longest= where there is a limit"
        )
    return lognormal(**values, longest=longest)


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Joint law of prompt and output lengths."""

    prompt: LogNormal
    output: LogNormal
    correlation: float = 0.0
    """Correlation of the logarithms of prompt and output, -1 to 1."""

    def __post_init__(self) -> None:
        if not -1 <= self.correlation <= 1:
            raise ConfigError(f"correlation {self.correlation}: must be between -1 and 1")

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Returns [count] prompt lengths and [count] output lengths, in tokens."""
        z, other = rng.standard_normal((2, count))
        along, across = self.correlation, math.sqrt(1 - self.correlation**2)
        return self.prompt.at(z), self.output.at(along * z + across * other)


PUBLISHED = {
    "azure-conversation": Lengths(
        prompt=LogNormal(mu=6.633, sigma=0.985), output=LogNormal(mu=5.019, sigma=0.859)
    ),
    "azure-code": Lengths(
        prompt=LogNormal(mu=6.999, sigma=1.36), output=LogNormal(mu=2.788, sigma=0.847)
    ),
}
"""Lognormal fits to the lengths in the Azure LLM inference traces of 2023."""
