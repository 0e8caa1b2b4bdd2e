"""gpt-oss: GQA with attention sinks, sliding windows in some layers; clamped SwiGLU with biases.

``alpha`` of the activation is a constant of the models' own code, as is the order in which the
checkpoints' fused tensors have gate and up: in turns.
"""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import check_router
from crosspool.models.rope import check_rope
from crosspool.models.spec import FFNSpec, GQASpec, MoEFFN, RouterSpec

_LAYERS = 36
_KINDS = ("sliding_attention", "full_attention")


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    _check_rotation(config)
    q_heads, kv_heads = grouped_heads(config, 64, 8, null_means_all=True)
    bias = config.boolean("attention_bias", True)
    full = _full_layers(config, config.integer("num_hidden_layers", _LAYERS))
    return replace(
        gqa(q_heads, kv_heads, head_size(config, hidden, q_heads, 64)),
        qkv_bias=bias,
        o_bias=bias,
        sliding_window=config.optional_integer("sliding_window", 128),
        full_layers=full,
        sinks=True,
    )


def _check_rotation(config: ConfigFile) -> None:
    """Raises ConfigError for a base without the scaling: transformers scales the rotations of a
    file that names none, whatever the base."""
    check_rope(config)
    named = config.values.get("rope_scaling") or config.values.get("rope_parameters")
    if not named and config.values.get("rope_theta") is not None:
        raise config.error("rope_theta", "must come with rope_scaling, or within rope_parameters")


def _full_layers(config: ConfigFile, layers: int) -> frozenset[int]:
    kinds = config.values.get("layer_types")
    if kinds is None:  # every other layer has the window, beginning with the first
        kinds = [_KINDS[layer % 2] for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - set(_KINDS):
        raise config.error("layer_types", f"must list {' or '.join(_KINDS)} for {layers} layers")
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    experts = config.integer(config.spelling("num_local_experts", "num_experts"), 128)
    router = RouterSpec(
        score="softmax",
        top_k=config.integer(config.spelling("num_experts_per_tok", "experts_per_token"), 4),
        logit_bias=True,
        # The softmax over the chosen logits is that over all of them, divided by its sum.
        renormalize=True,
    )
    moe = MoEFFN(
        experts=experts,
        intermediate=config.integer("intermediate_size", 2880),
        router=check_router(config, router, experts),
        biases=True,
        swiglu_limit=config.number("swiglu_limit", 7.0),
    )
    return (moe,) * layers


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(
        router="router",
        stacks=("experts.gate_up_proj", "experts.down_proj"),
        rows_last=True,
        alternates=True,
    ),
    vocab=201088,
    hidden=2880,
    layers=_LAYERS,
    context=131072,
    norm_eps=1e-5,
    eos_token_id=None,
)
