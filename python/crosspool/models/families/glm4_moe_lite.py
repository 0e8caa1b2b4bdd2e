"""GLM-4 MoE Lite (GLM-4.7-Flash): DeepSeek-V3's attention and routing, dense layers by a list."""

from __future__ import annotations

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.mla import read_mla
from crosspool.models.moe import moe_with_shared, sigmoid_router
from crosspool.models.spec import DenseFFN, FFNSpec, MLASpec


def _attention(config: ConfigFile, hidden: int) -> MLASpec:
    return read_mla(
        config,
        heads=20,
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        interleaved=config.boolean("rope_interleave", True),
    )


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    router = sigmoid_router(config, top_k=4, groups=1, top_groups=1, scale=1.8)
    moe = moe_with_shared(config, router, experts=64, intermediate=1536, shared=1)
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 10240))
    types = config.values.get("mlp_layer_types")
    if types is None:
        types = ["dense"] + ["sparse"] * (layers - 1)
    if not isinstance(types, list) or len(types) != layers or set(types) - {"dense", "sparse"}:
        raise config.error("mlp_layer_types", f"must list dense or sparse for {layers} layers")
    return tuple(moe if kind == "sparse" else dense for kind in types)


GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    attention=_attention,
    ffn=_ffn,
    vocab=154880,
    hidden=2048,
    layers=47,
    context=202752,
    norm_eps=1e-5,
    eos_token_id=1,
)
