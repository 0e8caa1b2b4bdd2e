"""Gated delta nets (arXiv 2412.06464), token by token: the reference kernel, in torch.

The states of requests lie in pages of the KV cache as rows of ``v_dim`` floats. A layer's rows
follow one another by key head, for each of which :class:`DeltaState` has the order.

A token's result depends on nothing but the tokens before it: a chunk of tokens is computed one
after another. The form for whole chunks, which multiplies matrices, would round otherwise, and a
request that is replayed in other chunks would write another text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosspool.kernels.advance import advance
from crosspool.kernels.norm import rms_norm, sigmoid

_NORM_EPS = 1e-6
"""Epsilon of the norms of queries and keys, in all models."""


@dataclass(frozen=True, kw_only=True)
class DeltaWeights:
    """A layer's weights, but for those of its products. ``k_heads`` x ``group`` value heads."""

    taps: torch.Tensor
    """Of the convolution, [k_heads, taps, group_width], the oldest token's first."""
    decay: torch.Tensor
    """Rates of decay, float32 [k_heads, group], above 0."""
    decay_bias: torch.Tensor
    """float32 [k_heads, group]."""
    out_norm: torch.Tensor
    """[v_dim]."""
    out_eps: float


class DeltaState:
    """The state of one request in one layer, float32.

    ``rows`` [k_heads * rows, v_dim] has for each key head the matrices of its ``group`` value
    heads, ``k_dim`` rows each, then the inputs of the convolution of the last tokens,
    [taps - 1, group_width], in as many rows as they need. The other attributes are views of it."""

    def __init__(self, rows: torch.Tensor, *, weights: DeltaWeights, k_dim: int) -> None:
        k_heads, taps, width = weights.taps.shape
        group, v_dim = weights.decay.shape[1], rows.shape[1]
        of_head = rows.view(k_heads, -1)
        split = group * k_dim * v_dim
        inputs = of_head[:, split : split + (taps - 1) * width]
        self.rows = rows
        self.matrices = of_head[:, :split].unflatten(1, (group, k_dim, v_dim))
        """[k_heads, group, k_dim, v_dim]."""
        self.inputs = inputs.unflatten(1, (taps - 1, width))
        """[k_heads, taps - 1, group_width], the oldest first."""


def by_key_head(channels: torch.Tensor, k_heads: int, k_dim: int) -> torch.Tensor:
    """Sorts the convolution's channels, which are all queries, then all keys, then all values, by
    the key head that they belong to: [channels, ...] -> [k_heads, group_width, ...]."""
    keys = k_heads * k_dim
    parts = channels.split((keys, keys, len(channels) - 2 * keys))
    return torch.cat([part.unflatten(0, (k_heads, -1)) for part in parts], dim=1)


def delta_step(
    weights: DeltaWeights,
    state: DeltaState,
    qkv: torch.Tensor,
    gate: torch.Tensor,
    *,
    rate: torch.Tensor,
    decay: torch.Tensor,
) -> torch.Tensor:
    """Moves the state on by one token, and returns what the token reads: [k_heads, group, v_dim] in
    the dtype of ``qkv``.

    ``qkv`` [k_heads, group_width]: each key head's query, key and values, before the convolution.
    ``gate`` [k_heads, group * v_dim]: of the result. ``rate`` and ``decay`` [k_heads, group]: how
    much of the new value is taken, and how much of the state goes, before their functions."""
    advance()
    dtype, (k_dim, v_dim) = qkv.dtype, state.matrices.shape[2:]
    inputs = torch.cat((state.inputs, qkv.float()[:, None]), dim=1)
    state.inputs.copy_(inputs[:, 1:])
    mixed = _rounded((inputs * weights.taps).sum(1), dtype)
    mixed = _rounded(mixed * sigmoid(mixed), dtype)
    q, k, v = mixed.split((k_dim, k_dim, mixed.shape[1] - 2 * k_dim), dim=1)
    q, k = _normed(q)[:, None, :, None] * k_dim**-0.5, _normed(k)[:, None, :, None]
    beta = sigmoid(rate)[..., None]
    left = torch.exp(-weights.decay * _softplus(decay.float() + weights.decay_bias))

    matrices = state.matrices
    matrices *= left[..., None, None]
    change = (v.unflatten(1, (-1, v_dim)) - (matrices * k).sum(2)) * beta
    matrices += k * change[:, :, None]
    read = (matrices * q).sum(2).to(dtype)
    wide = gate.float().view_as(read)
    normed = rms_norm(read, weights.out_norm, weights.out_eps)
    return (normed.float() * (wide * sigmoid(wide))).to(dtype)


def state_cells(kv: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the places for rows of ``width`` floats in the pages of a cache: a view, float32
    [pages, rows of a page, width]."""
    floats = kv.view(len(kv), -1).view(torch.float32)
    rows = floats.shape[1] // width
    cells: torch.Tensor = floats[:, : rows * width].unflatten(1, (rows, width))
    return cells


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).float()


def _normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x), as torch has it: above 20 it is x."""
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x.clamp(max=20.0))))
