"""Matrix products in which a row has the same bits whatever rows are beside it.

Torch's products round by their shape: a row alone comes out otherwise than among a hundred others.
So rows are multiplied in blocks of one size, the last one filled up with zeros. All products with
one weight then run the same kernel, which sums every row in the same order. A prompt that is
computed again, in other chunks, thereby gives what it gave before. It also keeps few kernels
compiled: in bfloat16, oneDNN makes one for every shape that it meets.

Large products are computed in pieces, so that no call of torch takes longer than a second or so,
and a thread that goes on is told from one that hangs (:mod:`crosspool.kernels.advance`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from crosspool.kernels.advance import advance

BLOCK_ROWS = 16
"""Rows that are multiplied at once. A row alone costs about as much as this many, since its time is
that of reading the weight; a long prompt takes about twice as long as in one product."""
_MULTIPLICATIONS = 1 << 32
"""Number of multiplications that a thread may carry out in one call of torch: a quarter of a second
on a core with 512-bit vectors, in float32."""


def at_once(cost: int) -> int:
    """How many of what costs ``cost`` multiplications each one call of torch may compute."""
    return max(1, _MULTIPLICATIONS * torch.get_num_threads() // max(1, cost))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [T, K] times the transpose of ``weight`` [N, K], plus ``bias`` [N]: [T, N]."""
    columns = at_once(BLOCK_ROWS * x.shape[1])
    if columns >= len(weight):
        return _in_blocks(x, partial(F.linear, weight=weight, bias=bias))
    weights = weight.split(columns)
    biases = [None] * len(weights) if bias is None else bias.split(columns)
    parts = zip(weights, biases, strict=True)
    return torch.cat([_in_blocks(x, partial(F.linear, weight=w, bias=b)) for w, b in parts], -1)


def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x`` [B, T, K] times ``y`` [B, K, N], matrix by matrix: [B, T, N]."""
    matrices = at_once(BLOCK_ROWS * y.shape[1] * y.shape[2])
    pieces = zip(x.split(matrices), y.split(matrices), strict=True)
    return torch.cat([_in_blocks(a, partial(torch.bmm, mat2=b)) for a, b in pieces])


def _in_blocks(x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    rows = x.shape[-2]
    padded = F.pad(x, (0, 0, 0, -rows % BLOCK_ROWS))
    blocks = []
    for block in padded.split(BLOCK_ROWS, dim=-2):
        advance()
        blocks.append(product(block.contiguous()))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)
    return out[..., :rows, :]
