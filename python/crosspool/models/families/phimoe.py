"""Phi-3.5-MoE (``phimoe``): GQA with LayerNorms, biases and longrope, and sparsemixer's routing."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import check_router
from crosspool.models.rope import check_divisors, check_full_rope
from crosspool.models.spec import FFNSpec, GQASpec, MoEFFN, RouterSpec

_ROPE_TYPES = ("default", "longrope")
_TOP_K = 2
"""Experts that sparsemixer chooses, whatever the config says, in transformers' model."""


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    rope = check_full_rope(config, also=("longrope",))
    if rope["rope_type"] not in _ROPE_TYPES:
        field = config.spelling("rope_scaling", "rope_parameters")
        raise config.error(field, f"rope_type must be one of {', '.join(_ROPE_TYPES)}")
    q_heads, kv_heads = grouped_heads(config, 32, 8, null_means_all=True)
    head_dim = head_size(config, hidden, q_heads)
    check_divisors(config, head_dim)
    bias = config.boolean("attention_bias", False)
    return replace(
        gqa(q_heads, kv_heads, head_dim),
        qkv_bias=bias,
        o_bias=bias,
        sliding_window=config.optional_integer("sliding_window", None),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    experts, jitter = config.integer("num_local_experts", 16), "router_jitter_noise"
    if config.integer("num_experts_per_tok", _TOP_K) != _TOP_K:
        raise config.error("num_experts_per_tok", f"must be {_TOP_K}, which sparsemixer chooses")
    router = RouterSpec(
        score="sparsemixer",
        top_k=_TOP_K,
        jitter=0.0 if config.values.get(jitter) == 0 else config.number(jitter, 0.01),
    )
    moe = MoEFFN(
        experts=experts,
        intermediate=config.integer("intermediate_size", 6400),
        router=check_router(config, router, experts),
    )
    return (moe,) * layers


PHIMOE = Family(
    model_type="phimoe",
    architecture="PhiMoEForCausalLM",
    further_architectures={"PhimoeForCausalLM": ("", "")},
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    layer_norms=True,
    head_bias="lm_head_bias",
    vocab=32064,
    hidden=4096,
    layers=32,
    context=131072,
    norm_eps=1e-5,
    eos_token_id=2,
)
