"""Reads what Qwen3-Next and Qwen3.5 have in turns: gated delta nets, and attention with gates."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.rope import rotated_features
from crosspool.models.spec import DeltaNetSpec, GQASpec

_KINDS = ("linear_attention", "full_attention")


def gated_attention(config: ConfigFile, hidden: int) -> GQASpec:
    """Reads the attention of the layers without a gated delta net. Raises ConfigError."""
    q_heads, kv_heads = grouped_heads(config, 16, 2, null_means_all=False)
    size = head_size(config, hidden, q_heads, 256)
    bias = config.boolean("attention_bias", False)
    return replace(
        gqa(q_heads, kv_heads, size, rotated_features(config, size, 0.25)),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        gated=True,
    )


def delta_net(config: ConfigFile, layers: int) -> DeltaNetSpec | None:
    """Reads the gated delta nets of a model of ``layers`` layers; None: it has none. Raises
    ConfigError."""
    linear = _linear_layers(config, layers)
    k_heads = config.integer("linear_num_key_heads", 16)
    v_heads = config.integer("linear_num_value_heads", 32)
    if v_heads % k_heads:
        raise config.error("linear_num_value_heads", f"must be a multiple of {k_heads} key heads")
    spec = DeltaNetSpec(
        layers=linear,
        k_heads=k_heads,
        v_heads=v_heads,
        k_dim=config.integer("linear_key_head_dim", 128),
        v_dim=config.integer("linear_value_head_dim", 128),
        taps=config.integer("linear_conv_kernel_dim", 4, minimum=2),
    )
    return spec if linear else None


def _linear_layers(config: ConfigFile, layers: int) -> frozenset[int]:
    kinds = config.values.get("layer_types")
    if kinds is None:
        interval = config.integer("full_attention_interval", 4)
        kinds = [_KINDS[(layer + 1) % interval == 0] for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - set(_KINDS):
        raise config.error("layer_types", f"must list {' or '.join(_KINDS)} for {layers} layers")
    if "full_attention" not in kinds:
        raise config.error("layer_types", "must have full_attention in some layer")
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
