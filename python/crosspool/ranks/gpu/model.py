"""A model as one GPU holds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crosspool.models.spec import ModelSpec, MoEFFN
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention


@dataclass(frozen=True)
class GPUModel:
    """A model as the GPU of an attention rank holds it."""

    spec: ModelSpec
    attention: GPUAttention
    ffn: GPUFFN | None
    """The share of its own FFN rank, if that has one."""
    kv: Tensor
    """[pages, layers, page_size, kv_width]."""

    @property
    def kinds(self) -> tuple[bool, ...]:
        """As :func:`kinds_of`."""
        return kinds_of(self.spec)

    @property
    def pages_of_sequence(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.attention.positions // self.kv.shape[2])


def kinds_of(spec: ModelSpec) -> tuple[bool, ...]:
    """Per layer, whether its FFN part is a MoE. Raises ValueError where two dense or two MoE layers
    differ in shape: the loop knows a graph for each of the two."""
    moe = [isinstance(ffn, MoEFFN) for ffn in dict.fromkeys(spec.ffn)]
    if len(set(moe)) != len(moe):
        raise ValueError("FFN layers of one kind differ in shape: a GPU does not drive that")
    return tuple(isinstance(ffn, MoEFFN) for ffn in spec.ffn)
