"""RMSNorm, LayerNorm, sigmoid, and factors on activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalises the last dimension of ``x`` [..., n] by its root mean square, in float32, and
    scales it by ``weight`` [n], which may be of float32, in ``x``'s dtype, as transformers does;
    None: by nothing."""
    wide = x.float()
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return wide if weight is None else (weight * wide).to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Normalises the last dimension of ``x`` [..., n] by its mean and variance, scales it by
    ``weight`` [n] and adds ``bias`` [n]; it is rounded to ``x``'s dtype once, at the end."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns ``x`` times ``factor``, in ``x``'s dtype."""
    return x if factor == 1.0 else x * factor


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Returns the sigmoid in float32. Torch's own, and its silu, round an element otherwise at the
    end of a tensor than in the middle; its exp does not."""
    return 1.0 / (1.0 + torch.exp(-x.float()))
