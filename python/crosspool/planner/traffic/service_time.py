"""How long a request holds its KV cache (the paper's T_i): measured by the trace, or by a model of
the decode speed."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.samples import Floats, Ints
from crosspool.planner.traffic.trace import Trace


class DecodeSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Service time as an affine function of the lengths. Raises ConfigError for speeds that give
    no time above 0."""

    tbt_s: float
    """Seconds per output token (time between tokens)."""
    prefill_tokens_per_s: float = math.inf
    """Infinite: prefill takes no time, or happens elsewhere."""
    ttft_s: float = 0.0
    """Seconds before the prefill that do not depend on the lengths, KV cache being held."""

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
        """[n] seconds for requests of [n] prompt and [n] output tokens."""
        prefill = prompt / self.prefill_tokens_per_s
        return self.ttft_s + prefill + output * self.tbt_s


def service_times(trace: Trace, speed: DecodeSpeed | None) -> Floats:
    """[n] seconds: the speed's where one is given, else what the trace recorded. Raises ConfigError
    when there is neither."""
    if speed is not None:
        return np.asarray(speed.seconds(trace.prompt, trace.output))
    if trace.service is None:
        raise ConfigError(
            "the trace does not say how long requests took: give a decode speed (time between "
            "tokens and prefill tokens per second)"
        )
    return trace.service
