"""Matrix products whose number of rows changes from step to step.

In bfloat16 torch hands them to oneDNN, which compiles a kernel for every shape that it meets and
keeps about a thousand of them, some 0.6 MB each. Ragged batches and experts have hundreds of row
counts, so rows are padded to one of few counts: fewer kernels are compiled and kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from crosspool.kernels.advance import advance


def padded_rows(rows: int) -> int:
    """Returns ``rows`` itself up to 8; above, the next of 12, 16, 24, 32, 48, 64, ..."""
    if rows <= 8:
        return rows
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [T, K] times the transpose of ``weight`` [N, K], plus ``bias`` [N]: [T, N]."""
    advance()
    rows = x.shape[0]
    return F.linear(_pad(x), weight, bias)[:rows]


def bmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x`` [B, T, K] times ``y`` [B, K, N], matrix by matrix: [B, T, N]."""
    advance()
    rows = x.shape[1]
    return torch.bmm(_pad(x), y)[:, :rows]


def _pad(x: torch.Tensor) -> torch.Tensor:
    missing = padded_rows(x.shape[-2]) - x.shape[-2]
    if missing == 0 or x.dtype != torch.bfloat16:
        return x
    return F.pad(x, (0, 0, 0, missing))
