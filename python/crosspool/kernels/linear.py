"""Matrix products in which a row has the same bits whatever rows are beside it.

Torch's products round by their shape: a row alone comes out otherwise than among a hundred others.
So rows are multiplied in blocks of one size, the last one filled up with zeros. All products with
one weight then run the same kernel, which sums every row in the same order. A prompt that is
computed again, in other chunks, thereby gives what it gave before. It also keeps few kernels
compiled: in bfloat16, oneDNN makes one for every shape that it meets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

BLOCK_ROWS = 16
"""Rows that are multiplied at once. A row alone costs about as much as this many, since its time is
that of reading the weight; a long prompt takes about twice as long as in one product."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [T, K] times the transpose of ``weight`` [N, K], plus ``bias`` [N]: [T, N]."""
    return _in_blocks(x, lambda block: F.linear(block, weight, bias))


def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x`` [B, T, K] times ``y`` [B, K, N], matrix by matrix: [B, T, N]."""
    return _in_blocks(x, lambda block: torch.bmm(block, y))


def _in_blocks(x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    rows = x.shape[-2]
    padded = F.pad(x, (0, 0, 0, -rows % BLOCK_ROWS))
    blocks = [product(block.contiguous()) for block in padded.split(BLOCK_ROWS, dim=-2)]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)
    return out[..., :rows, :]
