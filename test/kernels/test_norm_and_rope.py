"""RMSNorm and rope, bit for bit as transformers computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crosspool.kernels.norm import layer_norm, rms_norm
from crosspool.kernels.rope import rope_frequencies, rope_tables, rotate
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.mixtral.modeling_mixtral import (
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    apply_rotary_pos_emb,
)

DTYPES = [torch.float32, torch.bfloat16]
DIM = 16
POSITIONS = torch.tensor([0, 1, 5, 31, 32, 100, 4095, 131071])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = MixtralRMSNorm(48, eps=1e-3).to(dtype)
    norm.weight.copy_(torch.rand(48) + 0.5)
    x = torch.randn(7, 3, 48, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-3), norm(x), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_layer_norm(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((7, 48), (48,), (48,)))
    found = layer_norm(x + 3, weight, bias, 1e-5)
    wide = (x + 3).double()
    normed = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, correction=0) + 1e-5).sqrt()[
        :, None
    ]
    expected = (normed * weight + bias).to(dtype)
    torch.testing.assert_close(found, expected)


def test_rms_norm_sums_in_float32() -> None:
    """300 squared over 64 features leaves bfloat16's 8 bits of mantissa, not float32's 24."""
    x = torch.full((1, 64), 300.0, dtype=torch.bfloat16)
    x[0, 0] = 0.0
    expected = (x.double() / x.double().square().mean().sqrt()).to(torch.bfloat16)
    found = rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-6)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e5,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_tables(rope: dict[str, Any]) -> None:
    config = MixtralConfig(head_dim=DIM, rope_parameters=dict(rope))
    cos, sin = MixtralRotaryEmbedding(config)(torch.zeros(1), POSITIONS[None])
    found = rope_tables(POSITIONS, *rope_frequencies(config, DIM))
    for table, expected in zip(found, (cos, sin), strict=True):
        torch.testing.assert_close(torch.cat((table, table), -1), expected[0], atol=0, rtol=0)


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    config = DeepseekV3Config(qk_rope_head_dim=DIM)
    return rope_tables(POSITIONS, *rope_frequencies(config, DIM))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(dtype: torch.dtype, interleaved: bool) -> None:
    cos, sin = (table.to(dtype) for table in _tables())
    x = torch.randn(len(POSITIONS), 3, DIM, dtype=dtype)
    reference = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    wide = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    expected, _ = reference(x, x, *wide, unsqueeze_dim=1)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved), expected, atol=0, rtol=0)


def test_float32_tables_rotate_bfloat16_in_float32() -> None:
    cos, sin = _tables()
    x = torch.randn(len(POSITIONS), 3, DIM, dtype=torch.bfloat16)
    expected = rotate(x.float(), cos, sin, True).to(torch.bfloat16)
    torch.testing.assert_close(rotate(x, cos, sin, True), expected, atol=0, rtol=0)
