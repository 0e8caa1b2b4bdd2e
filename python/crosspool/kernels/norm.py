"""RMSNorm, and factors on activations."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension of ``x`` [..., n] by its root mean square, in float32, and
    scales it by ``weight`` [n] in ``x``'s dtype, as transformers does."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns ``x`` times ``factor``, in ``x``'s dtype."""
    return x if factor == 1.0 else x * factor
