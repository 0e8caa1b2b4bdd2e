"""Experts and gated MLP against float64; routers against transformers' own modules."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crosspool.kernels.moe import gated_mlp, moe_experts, route
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

HIDDEN, EXPERTS, TOP_K = 16, 12, 3


def _same_choice(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Checks that experts and weights are equal in any order."""
    dense = [
        torch.zeros(len(experts), EXPERTS).scatter_(1, experts, weights.float())
        for experts, weights in (found, expected)
    ]
    torch.testing.assert_close(*dense, atol=1e-6, rtol=0)
    assert (dense[0] > 0).sum() == found[0].numel()


@pytest.mark.parametrize("renormalize", [False, True])
@torch.inference_mode()
def test_softmax_router(renormalize: bool) -> None:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=renormalize,
    )
    reference = Qwen3MoeTopKRouter(config)
    reference.weight.copy_(torch.randn(EXPERTS, HIDDEN))
    x = torch.randn(50, HIDDEN)
    found = route(
        x,
        reference.weight,
        None,
        score="softmax",
        top_k=TOP_K,
        groups=1,
        top_groups=1,
        group_score="max",
        renormalize=renormalize,
        scale=1.0,
    )
    _, weights, experts = reference(x)
    _same_choice(found, (experts, weights))


@pytest.mark.parametrize("top_groups", [1, 2, 4])
@torch.inference_mode()
def test_group_limited_softmax_router(top_groups: int) -> None:
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        num_attention_heads=2,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=top_groups,
        routed_scaling_factor=1.7,
        moe_intermediate_size=4,
    )
    reference = DeepseekV2Moe(config)
    reference.num_experts = EXPERTS  # read by transformers 5.12.1, never set by it
    weight = torch.randn(EXPERTS, HIDDEN)
    x = torch.randn(50, HIDDEN)
    found = route(
        x,
        weight,
        None,
        score="softmax",
        top_k=TOP_K,
        groups=4,
        top_groups=top_groups,
        group_score="max",
        renormalize=False,
        scale=1.7,
    )
    _same_choice(found, reference.route_tokens_to_experts(F.linear(x, weight)[None]))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_groups", [1, 3])
@torch.inference_mode()
def test_sigmoid_router_with_bias(top_groups: int, renormalize: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=3,
        topk_group=top_groups,
        routed_scaling_factor=2.5,
        norm_topk_prob=renormalize,
        moe_intermediate_size=4,
    )
    reference = DeepseekV3MoE(config)
    reference.gate.weight.copy_(torch.randn(EXPERTS, HIDDEN))
    reference.gate.e_score_correction_bias.copy_(torch.randn(EXPERTS))
    x = torch.randn(50, HIDDEN, dtype=torch.bfloat16)
    found = route(
        x,
        reference.gate.weight,
        reference.gate.e_score_correction_bias,
        score="sigmoid",
        top_k=TOP_K,
        groups=3,
        top_groups=top_groups,
        group_score="top2_sum",
        renormalize=renormalize,
        scale=2.5,
    )
    _same_choice(found, reference.route_tokens_to_experts(reference.gate(x)))


@pytest.mark.parametrize("jitter", [0.01, 0.3])
@torch.inference_mode()
def test_sparsemixer(jitter: float) -> None:
    x, weight = torch.randn(50, HIDDEN), torch.randn(EXPERTS, HIDDEN)
    found = route(
        x,
        weight,
        None,
        score="sparsemixer",
        top_k=2,
        groups=1,
        top_groups=1,
        group_score="max",
        renormalize=False,
        scale=1.0,
        jitter=jitter,
    )
    weights, experts = sparsemixer(F.linear(x, weight), jitter, training=False)
    assert torch.equal(found[0], experts)
    torch.testing.assert_close(found[1], weights, atol=1e-6, rtol=0)
    assert (found[1] < 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_gpt_oss_layer(dtype: torch.dtype) -> None:
    """Router with a bias, and experts with biases and clamped activations."""
    config = GptOssConfig(
        hidden_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        intermediate_size=24,
        experts_implementation="eager",
    )
    reference = GptOssMLP(config).to(dtype)
    for parameter in reference.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (2.0 if parameter.dim() == 3 else 0.7))
    router, experts = reference.router, reference.experts
    x = torch.randn(50, HIDDEN, dtype=dtype)
    fused = experts.gate_up_proj.transpose(1, 2)
    assert (x @ experts.gate_up_proj[0]).abs().max() > experts.limit
    chosen = route(
        x,
        router.weight,
        None,
        logit_bias=router.bias,
        score="softmax",
        top_k=TOP_K,
        groups=1,
        top_groups=1,
        group_score="max",
        renormalize=True,
        scale=1.0,
    )
    found = moe_experts(
        x,
        *chosen,
        gate_up=torch.cat((fused[:, ::2], fused[:, 1::2]), dim=1),
        down=experts.down_proj.transpose(1, 2).contiguous(),
        first_expert=0,
        gate_up_bias=torch.cat(
            (experts.gate_up_proj_bias[:, ::2], experts.gate_up_proj_bias[:, 1::2]), dim=1
        ),
        down_bias=experts.down_proj_bias,
        swiglu_limit=experts.limit,
    )
    expected = reference(x[None])[0][0].float()
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_llama4_layer(dtype: torch.dtype) -> None:
    """Weights of experts are factors on their inputs. Some sigmoids of a row are 1, whose logits
    differ."""
    config = Llama4TextConfig(
        hidden_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        intermediate_size=24,
    )
    reference = Llama4TextMoe(config).to(dtype)
    for parameter in reference.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.7)
    x = torch.randn(50, HIDDEN, dtype=dtype)
    reference.router.weight *= 6
    logits = F.linear(x, reference.router.weight)
    assert ((logits.float().sigmoid() == 1).sum(dim=1) > TOP_K).any()
    chosen = route(
        x,
        reference.router.weight,
        None,
        score="sigmoid",
        top_k=TOP_K,
        groups=1,
        top_groups=1,
        group_score="max",
        renormalize=False,
        scale=1.0,
    )
    experts, shared = reference.experts, reference.shared_expert
    found = moe_experts(
        x,
        *chosen,
        gate_up=experts.gate_up_proj.transpose(1, 2).contiguous(),
        down=experts.down_proj.transpose(1, 2).contiguous(),
        first_expert=0,
        weighs_input=True,
    )
    both = torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
    found += gated_mlp(x, both, shared.down_proj.weight)
    expected = reference(x[None])[0].float()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_experts_share_the_sum(rows: int) -> None:
    """Ranks that hold experts 0-4 and 5-11 together give the whole sum."""
    intermediate = 8
    x = torch.randn(rows, HIDDEN)
    gate_up = torch.randn(EXPERTS, 2 * intermediate, HIDDEN)
    down = torch.randn(EXPERTS, HIDDEN, intermediate)
    experts = torch.rand(rows, EXPERTS).topk(TOP_K).indices
    weights = torch.rand(rows, TOP_K)
    expected = np.zeros((rows, HIDDEN))
    for row in range(rows):
        for expert, weight in zip(experts[row].tolist(), weights[row].tolist(), strict=True):
            gate, up = np.split(gate_up[expert].double().numpy() @ x[row].double().numpy(), 2)
            hidden = gate / (1 + np.exp(-gate)) * up
            expected[row] += weight * (down[expert].double().numpy() @ hidden)
    found = sum(
        moe_experts(
            x, experts, weights, gate_up=gate_up[share], down=down[share], first_expert=share.start
        )
        for share in (slice(0, 5), slice(5, EXPERTS))
    )
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_experts_that_nobody_chose_are_not_touched() -> None:
    gate_up = torch.full((EXPERTS, 8, HIDDEN), torch.nan)
    down = torch.full((EXPERTS, HIDDEN, 4), torch.nan)
    gate_up[[2, 7]], down[[2, 7]] = 1.0, 1.0
    experts = torch.tensor([[2, 7], [7, 2]])
    out = moe_experts(
        torch.randn(2, HIDDEN),
        experts,
        torch.ones(2, 2),
        gate_up=gate_up,
        down=down,
        first_expert=0,
    )
    assert out.isfinite().all()


def test_gated_mlp_with_no_columns_adds_nothing() -> None:
    """A rank may hold none of a narrow intermediate dimension."""
    out = gated_mlp(torch.randn(3, HIDDEN), torch.empty(0, HIDDEN), torch.empty(HIDDEN, 0))
    assert out.shape == (3, HIDDEN)
    assert not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(
    dtype: torch.dtype, score: Literal["softmax", "sigmoid"]
) -> None:
    hidden, width, top_k = 100, 72, 6
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    router, gate_up = random(EXPERTS, hidden), random(EXPERTS, 2 * width, hidden)
    down, dense_gate_up, dense_down = (
        random(EXPERTS, hidden, width),
        random(2 * 520, hidden),
        random(hidden, 520),
    )

    def computed(x: torch.Tensor) -> list[torch.Tensor]:
        experts, weights = route(
            x,
            router,
            torch.linspace(-1, 1, EXPERTS),
            score=score,
            top_k=top_k,
            groups=4,
            top_groups=3,
            group_score="top2_sum",
            renormalize=True,
            scale=2.0,
        )
        out = moe_experts(x, experts, weights, gate_up=gate_up, down=down, first_expert=0)
        return [experts, weights, out, gated_mlp(x, dense_gate_up, dense_down)]

    x = random(130, hidden)
    whole = computed(x)
    for first, rows in ((0, 1), (77, 1), (129, 1), (5, 3), (60, 16), (20, 65)):
        for found, expected in zip(computed(x[first : first + rows]), whole, strict=True):
            assert torch.equal(found, expected[first : first + rows]), (first, rows)
