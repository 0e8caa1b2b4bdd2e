"""Qwen3-MoE: GQA with RMS-normed q and k heads; softmax routing without shared experts."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import alternating_dense, softmax_moe
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import DenseFFN, FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    q_heads, kv_heads = grouped_heads(config, 32, 4, null_means_all=False)
    bias = config.boolean("attention_bias", False)
    window = config.optional_integer("sliding_window", 4096)
    return replace(
        gqa(q_heads, kv_heads, head_size(config, hidden, q_heads)),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        sliding_window=window if config.boolean("use_sliding_window", False) else None,
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    moe = softmax_moe(
        config,
        experts=128,
        top_k=8,
        intermediate=config.integer("moe_intermediate_size", 768),
        renormalize=config.boolean("norm_topk_prob", False),
    )
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 6144))
    return alternating_dense(config, layers, dense, moe)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    attention=_attention,
    ffn=_ffn,
    vocab=151936,
    hidden=2048,
    layers=24,
    context=32768,
    norm_eps=1e-6,
    eos_token_id=None,
)
