"""The KV cache that a request of a model holds, and the pairing of models with their traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crosspool.config.errors import ConfigError
from crosspool.kvpool.layout import KVLayout
from crosspool.planner.traffic.samples import Floats, ModelTraffic, Samples, Traffic

Charge = Literal["active", "promised"]
"""``active``: a request holds the tokens that it has at its age u, Q(u) = O_p + O_d * u / T (the
paper's demand). ``promised``: it holds O_p + O_d tokens from its first to its last moment, as on a
server that promises the worst case at admission."""


@dataclass(frozen=True)
class KVModel:
    """The properties of a model that matter to the KV pool."""

    name: str
    kv_bytes_per_token: int
    """Bytes of KV cache per token over all layers (the paper's kappa)."""
    page_size: int
    """Tokens per page; a request holds whole pages."""
    context: int
    """Most tokens of a request, prompt and output together."""
    state_bytes: int = 0
    """Bytes of recurrent state per request; 0 for none."""
    state_row: int = 1
    """Bytes of recurrent state that lie together in one page."""

    @property
    def page_bytes(self) -> int:
        return self.kv_bytes_per_token * self.page_size

    def layout(self, chunk_bytes: int) -> KVLayout:
        """Returns the layout of the model's pages. The planner takes them to lie one after another:
        gaps that ended requests leave between others are not modelled."""
        return KVLayout(self, self.page_size, chunk_bytes)


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages of one model's requests, one row each: at the share v of its time (u = v * T) a request
    holds ceil(first + growth * v) pages."""

    first: Floats
    """[n] prompt / page_size and the pages of recurrent state, or the number of promised pages."""
    growth: Floats
    """[n] output / page_size, or 0 where pages are promised."""


@dataclass(frozen=True, eq=False)
class KVLoad:
    """One model's traffic, with requests cut to the model's context."""

    kv: KVModel
    layout: KVLayout
    rate: float
    """Requests per second."""
    samples: Samples
    cut: int
    """Number of samples that did not fit into the context."""
    arrivals: Floats | None

    @property
    def active(self) -> float:
        """Mean number of requests in the system at a random time: rate * E[T] (Little's law)."""
        return self.rate * float(self.samples.service.mean()) if self.rate > 0 else 0.0

    def pages(self, charge: Charge) -> Pages:
        size = self.kv.page_size
        prompt, output = self.samples.prompt, self.samples.output
        if charge == "active":
            return Pages(self.layout.state_pages + prompt / size, output / size)
        pages = self.layout.pages_for(prompt + output)
        return Pages(pages.astype(np.float64), np.zeros(len(pages)))


def _cut(samples: Samples, kv: KVModel) -> tuple[Samples, int]:
    """Cuts prompts to all but one token of the context, then outputs to the rest of it; times stay.
    Also returns the number of rows that were cut."""
    prompt = np.minimum(samples.prompt, kv.context - 1)
    room = kv.context - prompt
    cut = int(np.count_nonzero((prompt < samples.prompt) | (room < samples.output)))
    output = np.minimum(samples.output, room)
    return Samples(prompt, output, samples.service), cut


def _check(model: ModelTraffic) -> None:
    samples = model.samples
    if not (np.isfinite(model.rate) and model.rate >= 0):
        raise ConfigError(f"rate of {model.model}: {model.rate} is not a rate; give 0 or more")
    if model.rate > 0 and len(samples) == 0:
        raise ConfigError(f"samples of {model.model}: there are none, but its rate is {model.rate}")
    if not len(samples.prompt) == len(samples.output) == len(samples.service):
        raise ConfigError(f"samples of {model.model}: the columns differ in length")
    if model.arrivals is not None and len(model.arrivals) != len(samples):
        raise ConfigError(
            f"arrivals of {model.model}: there are {len(model.arrivals)} for {len(samples)} samples"
        )
    for name, column, least in (
        ("prompt", samples.prompt, 1),
        ("output", samples.output, 1),
        ("service", samples.service, np.finfo(np.float64).tiny),
    ):
        wrong = np.flatnonzero(~(np.isfinite(column) & (column >= least)))
        if len(wrong):
            raise ConfigError(
                f"{name} of {model.model}, sample {wrong[0]}: {column[wrong[0]]} is too small"
                " or not finite"
            )


def kv_loads(
    traffic: Traffic, kv_models: Sequence[KVModel], chunk_bytes: int
) -> tuple[KVLoad, ...]:
    """Pairs the traffic with the models, in their order. Raises ConfigError when names or their
    order differ, and for impossible values."""
    names = [model.model for model in traffic.models]
    if names != [kv.name for kv in kv_models]:
        raise ConfigError(
            f"the traffic is for the models {names}, but the KV pool has "
            f"{[kv.name for kv in kv_models]}"
        )
    if chunk_bytes < 1:
        raise ConfigError(f"chunk_bytes: {chunk_bytes}; give 1 or more")
    found = []
    for model, kv in zip(traffic.models, kv_models, strict=True):
        if kv.kv_bytes_per_token < 1 or kv.page_size < 1 or kv.context < 2:
            raise ConfigError(
                f"{kv}: kv_bytes_per_token and page_size must be at least 1, context 2"
            )
        _check(model)
        samples, cut = _cut(model.samples, kv)
        found.append(KVLoad(kv, kv.layout(chunk_bytes), model.rate, samples, cut, model.arrivals))
    return tuple(found)
