"""OLMoE: attention with q and k normed over all heads at once, and clamped on request."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import softmax_moe
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    q_heads, kv_heads = grouped_heads(config, 16, None, null_means_all=True)
    head_dim = head_size(config, hidden, q_heads)
    if q_heads * head_dim != hidden:
        raise config.error("head_dim", f"heads must share hidden_size={hidden} evenly")
    bias = config.boolean("attention_bias", False)
    return replace(
        gqa(q_heads, kv_heads, head_dim),
        qk_norm="full",
        qkv_bias=bias,
        o_bias=bias,
        qkv_clip=config.optional_number("clip_qkv", None),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    moe = softmax_moe(
        config,
        experts=64,
        top_k=8,
        intermediate=config.integer("intermediate_size", 2048),
        renormalize=config.boolean("norm_topk_prob", False),
    )
    return (moe,) * layers


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    attention=_attention,
    ffn=_ffn,
    vocab=50304,
    hidden=2048,
    layers=16,
    context=4096,
    norm_eps=1e-5,
    eos_token_id=50279,
)
