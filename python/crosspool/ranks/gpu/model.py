"""Models as GPUs hold them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crosspool.models.spec import ModelSpec, MoEFFN
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention


@dataclass(frozen=True)
class GPUModel:
    """What the GPU of an attention rank holds of a model."""

    spec: ModelSpec
    attention: GPUAttention
    ffn: GPUFFN | None
    """The share of the device's own FFN rank; None where it has none of the model."""
    kv: Tensor
    """[pages, layers, page_size, kv_width]."""

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Whether the FFN part of each layer is a MoE; see :func:`kinds_of`."""
        return kinds_of(self.spec)

    @property
    def pages_of_sequence(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.attention.positions // self.kv.shape[2])


def kinds_of(spec: ModelSpec) -> tuple[bool, ...]:
    """Returns for each layer whether its FFN part is a MoE.

    Raises ValueError where two dense or two MoE layers differ in shape: a loop has one graph for
    dense and one for MoE layers."""
    moe = [isinstance(ffn, MoEFFN) for ffn in dict.fromkeys(spec.ffn)]
    if len(set(moe)) != len(moe):
        raise ValueError(
            "dense layers, or MoE layers, differ in shape: the GPU's loops drive one shape of each"
        )
    return tuple(isinstance(ffn, MoEFFN) for ffn in spec.ffn)
