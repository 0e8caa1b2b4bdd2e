"""Reads multi-head latent attention from a config.json, for the families that have it."""

from __future__ import annotations

from crosspool.models.config_file import ConfigFile
from crosspool.models.rope import check_full_rope, yarn_mscale
from crosspool.models.spec import MLASpec, RopeSpec


def read_mla(
    config: ConfigFile,
    *,
    heads: int,
    q_lora_rank: int,
    qk_nope_head_dim: int,
    v_head_dim: int,
    interleaved: bool,
    fp32_rope: bool = False,
) -> MLASpec:
    """Reads the attention; the numbers are the family's defaults. The softmax scale includes YaRN's
    ``mscale_all_dim``."""
    rope = check_full_rope(config)
    nope = config.integer("qk_nope_head_dim", qk_nope_head_dim)
    rope_dim = config.integer("qk_rope_head_dim", 64, minimum=2)
    if rope_dim % 2:
        raise config.error("qk_rope_head_dim", "must be even: features rotate in pairs")
    scale = (nope + rope_dim) ** -0.5
    mscale_all_dim = rope.get("mscale_all_dim") or 0
    if not isinstance(mscale_all_dim, int | float):
        raise config.error("rope_scaling", "mscale_all_dim must be a number")
    if rope["rope_type"] != "default" and mscale_all_dim:
        scale *= yarn_mscale(rope["factor"], mscale_all_dim) ** 2
    return MLASpec(
        q_heads=config.integer("num_attention_heads", heads),
        q_lora_rank=config.optional_integer("q_lora_rank", q_lora_rank),
        kv_lora_rank=config.integer("kv_lora_rank", 512),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=config.integer("v_head_dim", v_head_dim),
        scale=scale,
        rope=RopeSpec(dim=rope_dim, interleaved=interleaved, fp32=fp32_rope),
        qkv_bias=config.boolean("attention_bias", False),
    )
