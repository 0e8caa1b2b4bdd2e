"""Mixtral: GQA with an optional sliding window; softmax routing, always renormalised."""

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
    q_heads, kv_heads = grouped_heads(config, 32, 8, null_means_all=True)
    return replace(
        gqa(q_heads, kv_heads, head_size(config, hidden, q_heads)),
        sliding_window=config.optional_integer("sliding_window", None),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    moe = softmax_moe(
        config,
        experts=8,
        top_k=2,
        intermediate=config.integer("intermediate_size", 14336),
        renormalize=True,
    )
    return (moe,) * layers


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    vocab=32000,
    hidden=4096,
    layers=32,
    context=131072,
    norm_eps=1e-5,
    eos_token_id=2,
)
