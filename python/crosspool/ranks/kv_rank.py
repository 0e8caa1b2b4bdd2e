"""What every engine's attention rank has in common: its requests, and the KV pool's ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from crosspool.kvpool.layout import state_pages
from crosspool.kvpool.virtualizer import Virtualizer
from crosspool.models.spec import ModelSpec
from crosspool.ranks.weights import TensorListing
from crosspool.transport.messages import Logprobs, Release, Row, Sampling, Step


@dataclass
class Request:
    """A request that lives on this rank."""

    prompt_len: int
    sampling: Sampling
    logprobs: Logprobs
    output: list[int] = field(default_factory=list)
    """Tokens at and after ``prompt_len`` that have gone through a step."""
    last_residual: Tensor | None = None
    """Residual [hidden] at the end of the last prompt chunk, kept while the next chunk's first
    token wants its log-probability."""

    def wants_prompt_logprob(self, position: int) -> bool:
        return 0 <= self.logprobs.prompt_start <= position < self.prompt_len


class ListsTensors(Protocol):
    """A part of a model that lists what it holds."""

    def tensors(self) -> list[TensorListing]: ...


P = TypeVar("P", bound=ListsTensors)
R = TypeVar("R", bound=Request)


class KVRank(Generic[P, R]):
    """One attention rank: its requests, of type R, and its memory.

    By the model: ``specs`` and ``kv`` have those that there are, ``parts``, of type P, those whose
    weights are in memory. Each cache in ``kv`` is [pages, kv_layers, page_size, kv_width]; only its
    mapped chunks may be touched. The first pages of a request's table have its recurrent state,
    where the model has any."""

    def __init__(
        self,
        rank: int,
        specs: dict[int, ModelSpec],
        parts: Mapping[int, P],
        virtualizer: Virtualizer,
        kv: dict[int, Tensor],
    ) -> None:
        self.rank = rank
        self.specs = specs
        self.parts = parts
        self.virtualizer = virtualizer
        self.kv = kv
        self.steps = 0
        """Steps that have begun."""
        self._requests: dict[int, R] = {}

    @property
    def budget_bytes(self) -> int:
        """KV memory of this rank, mapped or free."""
        mapped = sum(self.virtualizer.mapped_bytes(model) for model in self.kv)
        return mapped + self.virtualizer.free_bytes

    @property
    def requests(self) -> int:
        """Number of requests that live here."""
        return len(self._requests)

    def add_model(self, model: int, spec: ModelSpec, kv: Tensor) -> None:
        """A further model comes; ``kv`` lies over its range of the virtualizer."""
        self.specs[model], self.kv[model] = spec, kv

    def remove_model(self, model: int) -> None:
        """A model goes, and its range with it. Raises ValueError while it has mapped chunks."""
        del self.specs[model], self.kv[model]
        self.virtualizer.remove(model)

    def release(self, release: Release) -> None:
        """Forgets requests and gives chunks back."""
        for request in release.requests:
            self._requests.pop(request, None)
        if release.unmap_chunks:
            self.virtualizer.unmap(release.model, release.unmap_chunks)

    def _open(self, step: Step, make: Callable[[int, Sampling, Logprobs], R]) -> None:
        """Maps the step's chunks and opens its requests. Raises RuntimeError for a step of a model
        that is not here."""
        if step.model not in self.specs:
            raise RuntimeError(f"step {step.step} is of model {step.model}, which is not here")
        if step.map_chunks:
            self.virtualizer.map(step.model, step.map_chunks)
        for opened in step.opens:
            self._requests[opened.request] = make(
                opened.prompt_len, opened.sampling, opened.logprobs
            )
        self.steps += 1

    def _request(self, step: Step, row: Row) -> R:
        """Returns the row's request, after the row's tokens were added to its output.

        Raises RuntimeError when it was never opened."""
        request = self._requests.get(row.request)
        if request is None:
            raise RuntimeError(f"step {step.step}: request {row.request} was never opened")
        request.output += row.tokens[max(request.prompt_len - row.start, 0) :]
        return request

    def _check_pages(self, step: Step, row: Row, pages: int) -> None:
        """Raises RuntimeError when a page table of ``pages`` pages does not cover the row with all
        of its lease."""
        slots = (pages - self._state_pages(step.model)) * self.kv[step.model].shape[2]
        end = row.start + len(row.tokens) + step.lease - 1
        if slots < end:
            raise RuntimeError(
                f"step {step.step}: request {row.request} has pages for {slots} tokens, not for"
                f" {end}"
            )

    def _state_pages(self, model: int) -> int:
        """Pages of recurrent state of each of the model's requests."""
        return state_pages(self.specs[model], self.kv[model].shape[2])

    def _check_row(self, step: Step, row: Row, positions: int) -> None:
        """Raises RuntimeError for a row that would lead native code or GPU kernels astray, which
        trust what they read. ``positions``: tokens of the longest sequence."""
        spec, pages = self.specs[step.model], self.kv[step.model].shape[0]
        wrong = None
        if min(row.tokens) < 0 or max(row.tokens) >= spec.vocab:
            wrong = f"a token outside the vocabulary of {spec.vocab}"
        elif row.pages and (min(row.pages) < 0 or max(row.pages) >= pages):
            wrong = f"a page outside the {pages} of its model"
        elif row.start < 0 or row.start + len(row.tokens) + step.lease - 1 > positions:
            wrong = f"a position outside the {positions} that its model has"
        if wrong is not None:
            raise RuntimeError(f"step {step.step}: request {row.request} has {wrong}")
