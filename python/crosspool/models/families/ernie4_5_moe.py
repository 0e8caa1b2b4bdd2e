"""ERNIE-4.5-MoE (``ernie4_5_moe``): plain GQA that rotates pairs in float32; softmax routing with a
correction bias, beside shared experts."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import check_router
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import DenseFFN, FFNSpec, GQASpec, MoEFFN, RopeSpec, RouterSpec

_LARGEST_NORM_MIN = 1e-6
"""The sum of the chosen experts' weights is never that small."""


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    if config.boolean("use_bias", False):
        raise config.error("use_bias", "must be false: FFN projections have no bias")
    q_heads, kv_heads = grouped_heads(config, 20, 4, null_means_all=False)
    head_dim = head_size(config, hidden, q_heads)
    return replace(
        gqa(q_heads, kv_heads, head_dim),
        rope=RopeSpec(dim=head_dim, interleaved=True, fp32=True),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    if config.number("moe_norm_min", 1e-12) > _LARGEST_NORM_MIN:
        raise config.error("moe_norm_min", f"must be at most {_LARGEST_NORM_MIN:g}")
    experts = config.integer("moe_num_experts", 64)
    size = config.integer("moe_intermediate_size", 1536)
    router = RouterSpec(
        score="softmax",
        top_k=config.integer("moe_k", 6),
        correction_bias=True,
        renormalize=True,
        fp32_logits=True,
    )
    if router.top_k > experts:
        raise config.error("moe_k", f"must be at most moe_num_experts={experts}")
    moe = MoEFFN(
        experts=experts,
        intermediate=size,
        router=check_router(config, router, experts),
        shared_intermediate=config.integer("moe_num_shared_experts", 2, minimum=0) * size,
    )
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 12288))
    first = config.integer("moe_layer_start_index", 1, minimum=0)
    last = config.integer("moe_layer_end_index", -1, minimum=-1)
    last = layers - 1 if last == -1 else last
    step = config.integer("moe_layer_interval", 1)
    return tuple(
        moe if (layer + 1) % step == 0 and first <= layer <= last else dense
        for layer in range(layers)
    )


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(correction_bias="moe_statics.e_score_correction_bias", bias_in_row=True),
    vocab=103424,
    hidden=2560,
    layers=28,
    context=131072,
    norm_eps=1e-5,
    tied_embeddings=True,
    eos_token_id=2,
)
