"""Qwen2-MoE and Qwen1.5-MoE (``qwen2_moe``): GQA with biases of q, k and v; softmax routing beside
a shared expert that has a gate."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import check_no_window, gqa, grouped_heads, head_size
from crosspool.models.moe import alternating_dense, softmax_moe
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import DenseFFN, FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    check_no_window(config)
    q_heads, kv_heads = grouped_heads(config, 16, 16, null_means_all=False)
    return replace(
        gqa(q_heads, kv_heads, head_size(config, hidden, q_heads)),
        qkv_bias=config.boolean("qkv_bias", True),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    routed = softmax_moe(
        config,
        experts=60,
        top_k=4,
        intermediate=config.integer("moe_intermediate_size", 1408),
        renormalize=config.boolean("norm_topk_prob", False),
    )
    shared = config.integer("shared_expert_intermediate_size", 5632)
    moe = replace(routed, shared_intermediate=shared, shared_gate=True)
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 5632))
    return alternating_dense(config, layers, dense, moe)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(shared="mlp.shared_expert"),
    vocab=151936,
    hidden=2048,
    layers=24,
    context=32768,
    norm_eps=1e-6,
    eos_token_id=None,
)
