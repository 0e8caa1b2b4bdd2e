"""The time for which a request holds its KV cache (the paper's T_i), from the trace or from a model
of the decode speed."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats, Ints
from crosspool.planner.traffic.trace import Trace


class DecodeSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Service time as an affine function of the lengths. Raises ConfigError for values with which
    a request could take no time."""

    tbt_s: float
    """Time between tokens, in seconds per output token."""
    prefill_tokens_per_s: float = math.inf
    """Prompt tokens per second of prefill; infinite when prefill takes no time."""
    ttft_s: float = 0.0
    """Seconds that every request holds KV cache beside prefill and decode."""

    def __post_init__(self) -> None:
        for field, minimum in (("tbt_s", 0.0), ("ttft_s", 0.0)):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= minimum):
                raise ConfigError(f"{field} {value}: must be a finite number of at least 0")
        if not self.prefill_tokens_per_s > 0:
            raise ConfigError(f"prefill_tokens_per_s {self.prefill_tokens_per_s}: must be above 0")
        if self.tbt_s == 0 and self.ttft_s == 0 and math.isinf(self.prefill_tokens_per_s):
            raise ConfigError("tbt_s 0.0: must be above 0, or requests take no time at all")

    def seconds(self, prompt: Ints, output: Ints) -> Floats:
        """Returns [n] service times in seconds for [n] prompt and [n] output lengths in tokens."""
        prefill = prompt / self.prefill_tokens_per_s
        return self.ttft_s + prefill + output * self.tbt_s


def service_times(trace: Trace, speed: DecodeSpeed | None) -> Floats:
    """Returns [n] service times in seconds: those of ``speed`` where one is given, else those that
    the trace recorded. Raises ConfigError when there is neither."""
    if speed is not None:
        return np.asarray(speed.seconds(trace.prompt, trace.output))
    if trace.service is None:
        raise ConfigError(
            "the trace does not say how long requests took: give a decode speed (the time between "
            "tokens, and prefill tokens per second)"
        )
    return trace.service
