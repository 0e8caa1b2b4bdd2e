"""DeepSeek-V2 and DeepSeek-V3: MLA, leading dense layers, shared experts, group-limited routing.

The rules are those of transformers 5.12.1 with one exception: V2's softmax scale includes YaRN's
``mscale_all_dim``, as in the models' own code and in later transformers (pull request 47435).
V2's ``norm_topk_prob`` has no effect in transformers, and none here.
"""

from __future__ import annotations

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.mla import read_mla
from crosspool.models.moe import leading_dense, moe_with_shared, sigmoid_router
from crosspool.models.spec import DenseFFN, FFNSpec, MLASpec, RouterSpec


def _v2_attention(config: ConfigFile, hidden: int) -> MLASpec:
    return read_mla(
        config,
        heads=32,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        v_head_dim=128,
        interleaved=True,
        fp32_rope=True,
    )


def _v3_attention(config: ConfigFile, hidden: int) -> MLASpec:
    return read_mla(
        config,
        heads=128,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        v_head_dim=128,
        interleaved=config.boolean("rope_interleave", True),
    )


def _v2_router(config: ConfigFile) -> RouterSpec:
    top_k = config.integer("num_experts_per_tok", None)
    scale = config.number("routed_scaling_factor", 1.0)
    method = config.text("topk_method", "greedy")
    if method == "greedy":
        return RouterSpec(score="softmax", top_k=top_k, scale=scale, fp32_logits=True)
    if method == "group_limited_greedy":
        return RouterSpec(
            score="softmax",
            top_k=top_k,
            groups=config.integer("n_group", None),
            top_groups=config.integer("topk_group", None),
            group_score="max",
            scale=scale,
            fp32_logits=True,
        )
    raise config.error("topk_method", "must be greedy or group_limited_greedy")


def _v2_ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    if config.boolean("mlp_bias", False):
        raise config.error("mlp_bias", "must be false: FFN projections have no bias")
    moe = moe_with_shared(config, _v2_router(config), experts=64, intermediate=1407, shared=2)
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 11008))
    return leading_dense(config, layers, 0, dense, moe)


def _v3_ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    router = sigmoid_router(config, top_k=8, groups=8, top_groups=4, scale=2.5)
    moe = moe_with_shared(config, router, experts=256, intermediate=2048, shared=1)
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 18432))
    return leading_dense(config, layers, 3, dense, moe)


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    attention=_v2_attention,
    ffn=_v2_ffn,
    vocab=32000,
    hidden=4096,
    layers=32,
    context=2048,
    norm_eps=1e-6,
    eos_token_id=2,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    attention=_v3_attention,
    ffn=_v3_ffn,
    vocab=129280,
    hidden=7168,
    layers=61,
    context=4096,
    norm_eps=1e-6,
    eos_token_id=1,
)
