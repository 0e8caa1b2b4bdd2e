"""GLM-4.5, GLM-4.6 and GLM-4.7 (``glm4_moe``): GQA whose heads rotate in part, with biases of q, k
and v; DeepSeek-V3's routing beside shared experts, after leading dense layers."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import leading_dense, moe_with_shared, sigmoid_router
from crosspool.models.rope import rotated_features
from crosspool.models.spec import DenseFFN, FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    q_heads, kv_heads = grouped_heads(config, 96, 8, null_means_all=False)
    head_dim = head_size(config, hidden, q_heads)
    return replace(
        gqa(q_heads, kv_heads, head_dim, rotated_features(config, head_dim, 0.5)),
        qk_norm="head" if config.boolean("use_qk_norm", False) else "none",
        qkv_bias=config.boolean("attention_bias", False),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    router = sigmoid_router(config, top_k=8, groups=1, top_groups=1, scale=1.0)
    moe = moe_with_shared(config, router, experts=128, intermediate=1408, shared=1)
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 10944))
    return leading_dense(config, layers, 1, dense, moe)


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    attention=_attention,
    ffn=_ffn,
    vocab=151552,
    hidden=4096,
    layers=46,
    context=131072,
    norm_eps=1e-5,
    eos_token_id=None,
)
