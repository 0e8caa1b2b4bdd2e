"""Qwen3 (``qwen3``), dense: GQA with RMS-normed q and k heads."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.gqa import check_no_window, gqa, grouped_heads, head_size
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import DenseFFN, FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    check_no_window(config)
    q_heads, kv_heads = grouped_heads(config, 32, 32, null_means_all=True)
    bias = config.boolean("attention_bias", False)
    return replace(
        gqa(q_heads, kv_heads, head_size(config, hidden, q_heads, 128)),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    return (DenseFFN(intermediate=config.integer("intermediate_size", 22016)),) * layers


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    attention=_attention,
    ffn=_ffn,
    vocab=151936,
    hidden=4096,
    layers=32,
    context=32768,
    norm_eps=1e-6,
    eos_token_id=None,
)
