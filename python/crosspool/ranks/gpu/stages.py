"""Stages of a step on a GPU: callables over a lane's fixed buffers, launched or captured.

A stage reads what changes (the layer, the rows, the inputs' address) from device memory, allocates
nothing and never asks the host, so that one captured graph serves every step of a row bucket and
every layer of a kind. The same callables run on CPU tensors where Triton interprets its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from crosspool.kernels.cuda_loop import GPUStage
from crosspool.ranks.gpu.attention import AttentionStages
from crosspool.ranks.gpu.ffn import StageCall, ffn_stages
from crosspool.ranks.gpu.inputs import InputLayout
from crosspool.ranks.gpu.links import Crossing
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.scratch import LaneBuffers


class HasStages(Protocol):
    """Stages of one model on one lane in one row bucket."""

    @property
    def calls(self) -> Mapping[GPUStage, StageCall]: ...

    @property
    def input_elements(self) -> int:
        """int32 elements of a step's inputs that the stages may read."""


class Stages(AttentionStages):
    """Stages of one model on one lane of an attention rank in one row bucket, those of the device's
    own FFN rank among them."""

    def __init__(
        self,
        model: GPUModel,
        layout: InputLayout,
        lane: LaneBuffers,
        crossing: Crossing | None = None,
    ) -> None:
        """``crossing``: how rows leave the device; None: they stay on it."""
        super().__init__(model, layout, lane, crossing or Crossing())
        self._ffns: dict[GPUStage, StageCall] = {}
        if model.ffn is not None:
            self._ffns = ffn_stages(lane, self.scratch)

    @property
    def calls(self) -> dict[GPUStage, StageCall]:
        """Every stage that the model has here."""
        return self.attention_calls | self._ffns


def buckets_up_to(rows: int) -> list[int]:
    """Returns row buckets: powers of two, and ``rows`` itself last."""
    powers = [1 << i for i in range(rows.bit_length()) if 1 << i < rows]
    return [*powers, rows]


def layouts_of(model: GPUModel, buckets: Sequence[int], sequences: int) -> list[InputLayout]:
    """Returns a layout for each bucket; ``sequences``: most sequences of a step."""
    return [
        InputLayout(bucket, min(bucket, sequences), model.pages_of_sequence) for bucket in buckets
    ]
