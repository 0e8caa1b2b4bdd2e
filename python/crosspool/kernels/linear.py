"""Matrix products whose number of rows changes from step to step.

In bfloat16 torch hands them to oneDNN, which compiles a kernel for every shape that it meets and
keeps about a thousand of them, some 0.6 MB each. Ragged batches and experts have hundreds of row
counts, so rows are padded to one of few counts: fewer kernels are compiled and kept.

Large products are computed in pieces, so that no call of torch takes longer than a second or so,
and a thread that goes on is told from one that hangs (:mod:`crosspool.kernels.advance`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from crosspool.kernels.advance import advance

_MULTIPLICATIONS = 1 << 32
"""Number of multiplications that a thread may carry out in one call of torch: a quarter of a second
on a core with 512-bit vectors, in float32."""


def padded_rows(rows: int) -> int:
    """Returns ``rows`` itself up to 8; above, the next of 12, 16, 24, 32, 48, 64, ..."""
    if rows <= 8:
        return rows
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


def at_once(cost: int) -> int:
    """How many of what costs ``cost`` multiplications each one call of torch may compute."""
    return max(1, _MULTIPLICATIONS * torch.get_num_threads() // max(1, cost))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [T, K] times the transpose of ``weight`` [N, K], plus ``bias`` [N]: [T, N]."""
    rows = x.shape[0]
    x = _pad(x)
    columns = at_once(x.shape[0] * x.shape[1])
    if columns >= weight.shape[0]:
        advance()
        return F.linear(x, weight, bias)[:rows]
    out = x.new_empty(x.shape[0], weight.shape[0])
    for low in range(0, weight.shape[0], columns):
        advance()
        piece = slice(low, low + columns)
        out[:, piece] = F.linear(x, weight[piece], None if bias is None else bias[piece])
    return out[:rows]


def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x`` [B, T, K] times ``y`` [B, K, N], matrix by matrix: [B, T, N]."""
    rows = x.shape[1]
    x = _pad(x)
    matrices = at_once(x.shape[1] * y.shape[1] * y.shape[2])
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    for low in range(0, x.shape[0], matrices):
        advance()
        piece = slice(low, low + matrices)
        torch.bmm(x[piece], y[piece], out=out[piece])
    return out[:, :rows]


def _pad(x: torch.Tensor) -> torch.Tensor:
    missing = padded_rows(x.shape[-2]) - x.shape[-2]
    if missing == 0 or x.dtype != torch.bfloat16:
        return x
    return F.pad(x, (0, 0, 0, missing))
