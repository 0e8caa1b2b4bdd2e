"""Llama (``llama``), dense: plain GQA, with biases on request.

GGUF files of Llama 3.1 have divisors of the rotations' frequencies."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.rope import check_divisors, check_full_rope
from crosspool.models.spec import DenseFFN, FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config, also=("divided",))
    q_heads, kv_heads = grouped_heads(config, 32, None, null_means_all=True)
    head_dim = head_size(config, hidden, q_heads)
    check_divisors(config, head_dim)
    bias = config.boolean("attention_bias", False)
    return replace(gqa(q_heads, kv_heads, head_dim), qkv_bias=bias, o_bias=bias)


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    if config.boolean("mlp_bias", False):
        raise config.error("mlp_bias", "must be false: FFN projections have no bias")
    return (DenseFFN(intermediate=config.integer("intermediate_size", 11008)),) * layers


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    attention=_attention,
    ffn=_ffn,
    vocab=32000,
    hidden=4096,
    layers=32,
    context=2048,
    norm_eps=1e-6,
    eos_token_id=2,
)
