"""Hunyuan-A13B (``hunyuan_v1_moe``): GQA whose heads are normed behind the rotation; softmax
routing in float32 beside one shared expert."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import check_router
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import FFNSpec, GQASpec, MoEFFN, RouterSpec

_TRUE = ("use_qk_norm", "norm_topk_prob")
_LEAST_HEAD = 2
"""Features of a head for which ``alpha`` raises the base without bound."""


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    rope = check_full_rope(config, also=("dynamic",))
    for field in _TRUE:
        if not config.boolean(field, True):
            raise config.error(field, "must be true")
    if config.boolean("use_cla", False):
        raise config.error("use_cla", "must be false: every layer has keys and values of its own")
    q_heads, kv_heads = grouped_heads(config, 32, None, null_means_all=True)
    head_dim = head_size(config, hidden, q_heads)
    if rope["rope_type"] == "dynamic" and head_dim <= _LEAST_HEAD:
        raise config.error("head_dim", f"must be above {_LEAST_HEAD} with a rope_type of dynamic")
    bias = config.boolean("attention_bias", False)
    return replace(
        gqa(q_heads, kv_heads, head_dim),
        qk_norm="rotated head",
        qkv_bias=bias,
        o_bias=bias,
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    experts = _alike(config, "num_experts", 1)
    size = config.integer("intermediate_size", 11008)
    for field, value in (("moe_intermediate_size", size), ("num_shared_expert", 1)):
        if _alike(config, field, value) != value:
            raise config.error(field, f"must be {value} for every layer")
    router = RouterSpec(
        score="softmax", top_k=_alike(config, "moe_topk", 1), renormalize=True, fp32_logits=True
    )
    if router.top_k > experts:
        raise config.error("moe_topk", f"must be at most num_experts={experts}")
    moe = MoEFFN(
        experts=experts,
        intermediate=size,
        router=check_router(config, router, experts),
        shared_intermediate=size,
    )
    return (moe,) * layers


def _alike(config: ConfigFile, field: str, default: int) -> int:
    """Reads a number that is the same for all layers: an integer, or a list of equal ones."""
    if not isinstance(config.values.get(field), list):
        return config.integer(field, default)
    first, *others = config.integers(field) or [0]
    if first < 1 or any(other != first for other in others):
        raise config.error(field, "must be the same for every layer, and at least 1")
    return first


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(router="gate.wg", shared="mlp.shared_mlp"),
    qk_norms=("query_layernorm", "key_layernorm"),
    vocab=290943,
    hidden=4096,
    layers=32,
    context=2048,
    norm_eps=1e-5,
    eos_token_id=2,
)
