"""MiniMax-M2 (``minimax_m2``): GQA whose heads rotate in part, with q and k normed over all heads
at once; sigmoid routing with a correction bias.

Published configs say with ``rotary_dim`` how many features rotate. transformers 5.12.1 reads
``partial_rotary_factor`` alone; both are read here."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import check_router
from crosspool.models.rope import check_rope, rotated_features
from crosspool.models.spec import FFNSpec, GQASpec, MoEFFN, RouterSpec

_ONLY = {"scoring_func": "sigmoid", "qk_norm_type": "per_layer"}
_TRUE = ("use_qk_norm", "use_routing_bias")


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    _check_known(config)
    q_heads, kv_heads = grouped_heads(config, 48, 8, null_means_all=False)
    head_dim = head_size(config, hidden, q_heads, 128)
    rotated = rotated_features(config, head_dim, 1.0)
    if "rotary_dim" in config.values:
        rotated = config.integer("rotary_dim", None, minimum=2)
        if rotated % 2 or rotated > head_dim:
            raise config.error("rotary_dim", f"must be even and at most head_dim={head_dim}")
        if check_rope(config)["rope_type"] != "default":
            raise config.error("rotary_dim", "cannot be combined with a scaled rope_type")
    return replace(gqa(q_heads, kv_heads, head_dim, rotated), qk_norm="full")


def _check_known(config: ConfigFile) -> None:
    for field, value in _ONLY.items():
        if config.text(field, value) != value:
            raise config.error(field, f"must be {value}")
    for field in _TRUE:
        if not config.boolean(field, True):
            raise config.error(field, "must be true")
    if any(kind != 1 for kind in config.integers("attn_type_list")):
        raise config.error("attn_type_list", "must be 1, full attention, for every layer")


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    experts = config.integer(config.spelling("num_local_experts", "num_experts"), 256)
    router = RouterSpec(
        score="sigmoid",
        top_k=config.integer("num_experts_per_tok", 8),
        correction_bias=True,
        renormalize=True,
        fp32_logits=True,
    )
    moe = MoEFFN(
        experts=experts,
        intermediate=config.integer("intermediate_size", 1536),
        router=check_router(config, router, experts),
    )
    return (moe,) * layers


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(
        block="block_sparse_moe",
        correction_bias="e_score_correction_bias",
        gate="w1",
        up="w3",
        down="w2",
    ),
    vocab=200064,
    hidden=3072,
    layers=62,
    context=196608,
    norm_eps=1e-6,
    eos_token_id=200020,
)
