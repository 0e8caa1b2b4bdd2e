"""Embedding rows, RMSNorm, residual sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.tables import TensorTable, pointer_at, tl_dtype

_EMBED_BLOCK = 1024


def embed(
    table: torch.Tensor, tokens: torch.Tensor, count: torch.Tensor, out: torch.Tensor
) -> None:
    """out[i] = table[tokens[i]]: ``table`` [vocab, hidden], ``tokens`` int32 [bucket], ``out``
    [bucket, hidden] in any float dtype (the residual's)."""
    bucket, hidden = out.shape
    grid = (bucket, triton.cdiv(hidden, _EMBED_BLOCK))
    _embed_kernel[grid](table, tokens, count, out, hidden, BLOCK=_EMBED_BLOCK)


def rms_norm(
    x: torch.Tensor,
    weight: TensorTable,
    layer: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
    addend: torch.Tensor | None = None,
) -> None:
    """out[i] = x[i] / rms(x[i]) * weight: ``x`` and ``out`` [bucket, n], rows at any stride.

    ``addend`` [bucket, n], of the model's dtype or float32, is added to ``x`` in place first (the
    combine to the residual)."""
    bucket, n = out.shape
    block = triton.next_power_of_2(n)
    _norm_kernel[(bucket,)](
        x,
        x.stride(0),
        addend,
        weight.pointers,
        layer,
        count,
        out,
        out.stride(0),
        eps,
        N=n,
        WEIGHT=tl_dtype(weight.dtype),
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )


@triton.jit
def _embed_kernel(
    table: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row).to(tl.int64)
    values = tl.load(table + token * hidden + columns, columns < hidden)
    tl.store(out + row * hidden + columns, values.to(out.dtype.element_ty), columns < hidden)


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    addend: tl.tensor,  # or None
    weights: tl.tensor,
    layer: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    at = x + row.to(tl.int64) * x_stride + columns
    values = tl.load(at, inside, other=0.0).to(tl.float32)
    if addend is not None:
        values += tl.load(addend + row * N + columns, inside, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(at, rounded, inside)
        values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / N + eps)
    weight = tl.load(pointer_at(weights, tl.load(layer), WEIGHT) + columns, inside, other=0.0)
    normed = values * inverse * weight.to(tl.float32)
    tl.store(out + row * out_stride + columns, normed.to(out.dtype.element_ty), inside)
