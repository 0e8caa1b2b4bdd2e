"""Llama 4 (``llama4_text``): GQA over chunks in most layers, and over all tokens in layers without
rotations; one of the experts of a token beside a shared one, in all layers or some.

A published config is that of a multimodal model, of which the language model is served."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family, FFNNames
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import check_router
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import (
    DenseFFN,
    FFNSpec,
    GQASpec,
    MoEFFN,
    RopeSpec,
    RouterSpec,
    TemperatureTuning,
)

_LAYERS = 48
_KINDS = ("chunked_attention", "full_attention")


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    layers = config.integer("num_hidden_layers", _LAYERS)
    q_heads, kv_heads = grouped_heads(config, 40, 8, null_means_all=True)
    head_dim = head_size(config, hidden, q_heads, 128)
    bias = config.boolean("attention_bias", False)
    rotates = _rotates(config, layers)
    chunk = config.optional_integer("attention_chunk_size", 8192)
    return replace(
        gqa(q_heads, kv_heads, head_dim),
        rope=RopeSpec(dim=head_dim, interleaved=True, fp32=True),
        qk_norm="unweighted rotated head" if config.boolean("use_qk_norm", True) else "none",
        qkv_bias=bias,
        o_bias=bias,
        sliding_window=chunk,
        chunked=chunk is not None,
        full_layers=_full_layers(config, rotates),
        unrotated_layers=frozenset(i for i, turned in enumerate(rotates) if not turned),
        temperature=_temperature(config),
    )


def _rotates(config: ConfigFile, layers: int) -> list[bool]:
    """Whether each layer rotates, which ``no_rope_layers`` says with 1, in spite of its name."""
    listed = config.integers("no_rope_layers")
    if not listed:
        interval = config.integer("no_rope_layer_interval", 4)
        return [bool((layer + 1) % interval) for layer in range(layers)]
    if len(listed) != layers:
        raise config.error("no_rope_layers", f"must list 0 or 1 for each of {layers} layers")
    return [bool(turned) for turned in listed]


def _full_layers(config: ConfigFile, rotates: list[bool]) -> frozenset[int]:
    kinds = config.values.get("layer_types")
    if kinds is None:
        kinds = [_KINDS[not turned] for turned in rotates]
    if not isinstance(kinds, list) or len(kinds) != len(rotates) or set(kinds) - set(_KINDS):
        wanted = f"must list {' or '.join(_KINDS)} for {len(rotates)} layers"
        raise config.error("layer_types", wanted)
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


def _temperature(config: ConfigFile) -> TemperatureTuning | None:
    field = "attn_temperature_tuning"
    tuned = config.values.get(field, True)  # published with the value 4
    if not isinstance(tuned, int):
        raise config.error(field, "must be true or false")
    if not tuned:
        return None
    return TemperatureTuning(config.number("attn_scale", 0.1), config.integer("floor_scale", 8192))


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    experts = config.integer("num_local_experts", 16)
    size = config.integer("intermediate_size", 8192)
    router = RouterSpec(score="sigmoid", top_k=config.integer("num_experts_per_tok", 1))
    moe = MoEFFN(
        experts=experts,
        intermediate=size,
        router=check_router(config, router, experts),
        shared_intermediate=size,
        weighs_input=True,
    )
    dense = DenseFFN(intermediate=config.integer("intermediate_size_mlp", 16384))
    step = config.integer("interleave_moe_layer_step", 1)
    listed = config.integers("moe_layers")
    if config.values.get("moe_layers") is None:
        listed = list(range(step - 1, layers, step))
    return tuple(moe if layer in listed else dense for layer in range(layers))


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    further_architectures={"Llama4ForConditionalGeneration": ("", "language_model.")},
    attention=_attention,
    ffn=_ffn,
    names=FFNNames(
        block="feed_forward",
        router="router",
        stacks=("experts.gate_up_proj", "experts.down_proj"),
        rows_last=True,
        shared="feed_forward.shared_expert",
    ),
    vocab=202048,
    hidden=5120,
    layers=_LAYERS,
    context=131072,
    norm_eps=1e-5,
    eos_token_id=2,
)
