"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def rope_frequencies(config: PreTrainedConfig, dim: int) -> tuple[torch.Tensor, float]:
    """Returns the inverse frequencies, float32 [dim / 2], and the factor on cos and sin, for the
    rope type that ``config.rope_parameters`` names."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return unscaled_frequencies(rope["rope_theta"], dim), 1.0


def unscaled_frequencies(base: float, dim: int) -> torch.Tensor:
    """Returns the inverse frequencies, float32 [dim / 2], of rotations that nothing scales."""
    return 1.0 / _wavelengths(base, dim)


def divided_frequencies(base: float, divisors: Sequence[float]) -> torch.Tensor:
    """Returns the inverse frequencies, float32 [pairs], of rotations each of which has one of
    ``divisors``, rounded as transformers rounds those of longrope."""
    return 1.0 / (torch.tensor(divisors) * _wavelengths(base, 2 * len(divisors)))


def _wavelengths(base: float, dim: int) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return base**exponents


def rope_tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin, float32 [T, dim / 2] each, of int64 ``positions`` [T]."""
    angles = positions.float()[:, None] * inv_freq
    return angles.cos() * scaling, angles.sin() * scaling


def query_factors(positions: torch.Tensor, scale: float, floor: int) -> torch.Tensor:
    """Returns the factors of :class:`crosspool.models.spec.TemperatureTuning` on queries at int64
    ``positions`` [T], float32 [T]."""
    return torch.log1p(torch.floor((positions.float() + 1.0) / floor)) * scale + 1.0


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotates the heads of ``x`` [T, heads, dim] by cos and sin [T, dim / 2].

    The products have the wider dtype of ``x`` and the tables, the result that of ``x``. Pairs lie
    side by side in ``x`` (interleaved) or half a head apart. In the result they always lie half a
    head apart: as q and k are ordered alike, their products do not change."""
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
