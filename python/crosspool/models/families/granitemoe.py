"""Granite-MoE (``granitemoe``): GQA, softmax routing, and factors on embeddings, attention scores,
what a layer adds to the residual, and logits.

The factor on what an FFN adds is part of its experts' weights."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import softmax_moe
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    q_heads, kv_heads = grouped_heads(config, 32, None, null_means_all=True)
    bias = config.boolean("attention_bias", False)
    return replace(
        gqa(q_heads, kv_heads, head_size(config, hidden, q_heads)),
        scale=config.number("attention_multiplier", 1.0),
        qkv_bias=bias,
        o_bias=bias,
        out_scale=_residual_factor(config),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    moe = softmax_moe(
        config,
        experts=8,
        top_k=2,
        intermediate=config.integer("intermediate_size", 11008),
        renormalize=True,
    )
    return (replace(moe, router=replace(moe.router, scale=_residual_factor(config))),) * layers


def _residual_factor(config: ConfigFile) -> float:
    return config.number("residual_multiplier", 1.0)


GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(
        block="block_sparse_moe",
        router="router.layer",
        stacks=("input_linear.weight", "output_linear.weight"),
        # llama.cpp's converter takes them apart as Mixtral's, whose names GGUF has.
        gate="w1",
        up="w3",
        down="w2",
    ),
    embed_factor="embedding_multiplier",
    logit_divisor="logits_scaling",
    vocab=32000,
    hidden=4096,
    layers=32,
    context=2048,
    norm_eps=1e-6,
    eos_token_id=2,
)
