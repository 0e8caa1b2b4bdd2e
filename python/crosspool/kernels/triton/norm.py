"""Embedding rows, RMSNorm, residual sums."""

from __future__ import annotations

import torch

from crosspool.kernels.triton.tables import TensorTable


def embed(
    table: torch.Tensor, tokens: torch.Tensor, count: torch.Tensor, out: torch.Tensor
) -> None:
    """out[i] = table[tokens[i]]: ``table`` [vocab, hidden], ``tokens`` int32 [bucket], ``out``
    [bucket, hidden] in any float dtype (the residual's)."""
    raise NotImplementedError


def rms_norm(
    x: torch.Tensor,
    weight: TensorTable,
    layer: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
    rows: torch.Tensor | None = None,
) -> None:
    """out[i] = x[i] / rms(x[i]) * weight: ``x`` [*, n], ``out`` [bucket, n], each row contiguous.

    ``rows``: int32 [bucket]; out[i] is made of x[rows[i]] instead (the rows that the LM head
    wants; ``count`` is then their number)."""
    raise NotImplementedError


def add_rms_norm(
    residual: torch.Tensor,
    addend: torch.Tensor,
    weight: TensorTable,
    layer: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
) -> None:
    """residual += addend, then out = its RMSNorm: all [bucket, n]; ``addend`` (the combine) is of
    the model's dtype or float32."""
    raise NotImplementedError


def add(residual: torch.Tensor, addend: torch.Tensor, count: torch.Tensor) -> None:
    """residual += addend, both [bucket, n]: the last layer's combine."""
    raise NotImplementedError
