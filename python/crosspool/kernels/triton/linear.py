"""Matrix products with rows of activations, bound by reading the weights.

Made for buckets of up to a few hundred rows and for weights behind a table. For thousands of rows,
where the layer's pointers may be fixed at capture, ``torch.matmul`` (cuBLAS) is the faster choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosspool.kernels.triton.tables import TensorTable


@dataclass(frozen=True)
class LinearWorkspace:
    """What products that split K need beside their arrays. One serves every product of a lane,
    one after another; it is not for two streams at a time."""

    partials: torch.Tensor
    """float32, flat."""
    arrivals: torch.Tensor
    """int32, flat; zero between products."""

    @classmethod
    def allocate(cls, device: torch.device) -> LinearWorkspace:
        """Enough for every product: those that would need more do not split K."""
        raise NotImplementedError


def linear(
    x: torch.Tensor,
    weight: TensorTable,
    layer: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    workspace: LinearWorkspace,
    *,
    bias: TensorTable | None = None,
    add: bool = False,
) -> None:
    """out = x W^T + bias, or out += it (``add``: the residual's sum).

    ``x`` [bucket, K] of a 16-bit or 32-bit float dtype, rows at any stride; ``weight`` table of
    [N, K]; ``bias`` table of [N]; ``out`` [bucket, N], rows at any stride, rounded to its own
    dtype. A float32 weight takes x as float32 (a router's); a bfloat16 one takes bfloat16."""
    raise NotImplementedError


def head_logits(
    x: torch.Tensor, weight: torch.Tensor, count: torch.Tensor, logits: torch.Tensor
) -> None:
    """LM head: logits = x W^T rounded to the model's dtype, held as float32 [bucket, vocab].

    ``x`` [bucket, hidden] and ``weight`` [vocab, hidden] are of the model's dtype."""
    raise NotImplementedError
