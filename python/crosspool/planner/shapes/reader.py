"""Reads a :class:`ModelShape` from a ``config.json``.

A model whose family the server runs is read as the server reads it (:mod:`crosspool.models`), but
in any dtype and with any quantisation. For all other models, dense ones among them, this module
takes the sizes from the known spellings of their fields.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Literal

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import ConfigFile
from crosspool.models.registry import attention_tensors, family_of, read_spec
from crosspool.models.spec import DeltaNetSpec, DenseFFN, MLASpec, ModelSpec, MoEFFN
from crosspool.planner.shapes.shape import AttentionKind, ModelShape

_SPELLINGS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "context": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    "dtype": ("dtype", "torch_dtype"),
}
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_NORMS = {"rotated head": "head", "unweighted rotated head": "none"}
"""Norms of q and k by where they lie, as norms by their weights."""
_LAYER_KINDS = {"full_attention": False, "sliding_attention": True}


class _Habits(msgspec.Struct, frozen=True):
    """Properties that a ``model_type`` fixes in its code and leaves out of its config."""

    qkv_bias: bool = False
    """Default for files with neither ``attention_bias`` nor ``qkv_bias``."""
    o_bias: bool = True
    """The output projection has a bias where q, k and v have one."""
    qk_norm: Literal["none", "head", "full"] = "none"
    correction_bias: bool = False
    router_fp32: bool = False


_HABITS = {
    "qwen2": _Habits(qkv_bias=True, o_bias=False),
}


def shape_of_config(path: Path, name: str | None = None) -> ModelShape:
    """Reads the shape of a decoder with gated FFNs from its ``config.json`` or the folder that
    holds it. A model type that neither the server nor ``_HABITS`` knows is taken to have Llama's
    biases and norms. ``name`` is the shape's id; by default the folder's name, or the file's where
    it is not ``config.json``. Raises ConfigError that names file and field."""
    file = path if path.suffix == ".json" and not path.is_dir() else path / "config.json"
    by_folder = file.name == "config.json"
    name = name or (file.resolve().parent.name if by_folder else file.stem)
    config = ConfigFile(file).language_part()
    if config.values.get("is_encoder_decoder"):
        raise config.error("is_encoder_decoder", "must be a decoder")
    dtype_bytes = _dtype_bytes(config)
    family = family_of(config)
    if family is not None:
        return shape_of_spec(read_spec(config, family, "bfloat16"), name, dtype_bytes)
    return _shape_of_fields(config, name, dtype_bytes)


def shape_of_spec(spec: ModelSpec, name: str, dtype_bytes: int) -> ModelShape:
    """Returns the shape of a model that the server runs, with weights of ``dtype_bytes`` each."""
    attention = spec.attention
    fields: dict[str, Any]
    if isinstance(attention, MLASpec):
        fields = {
            "attention": "mla",
            "kv_heads": 1,
            "head_dim": attention.qk_nope_head_dim + attention.qk_rope_head_dim,
            "kv_lora_rank": attention.kv_lora_rank,
            "q_lora_rank": attention.q_lora_rank or 0,
            "qk_rope_head_dim": attention.qk_rope_head_dim,
            "v_head_dim": attention.v_head_dim,
            "o_bias": attention.qkv_bias,
        }
    else:
        fields = {
            "attention": _kind(attention.q_heads, attention.kv_heads),
            "kv_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "o_bias": attention.o_bias,
            "qk_norm": _NORMS.get(attention.qk_norm, attention.qk_norm),
            "sinks": attention.sinks,
            "gated": attention.gated,
            **_sliding(
                attention.sliding_window,
                sum(attention.window(layer) is not None for layer in range(spec.layers)),
                spec.context,
            ),
        }
    dense = [ffn for ffn in spec.ffn if isinstance(ffn, DenseFFN)]
    moe = next((ffn for ffn in spec.ffn if isinstance(ffn, MoEFFN)), None)
    if moe is not None:
        fields |= {
            "experts": moe.experts,
            "top_k": moe.router.top_k,
            "moe_intermediate": moe.intermediate,
            "shared_intermediate": moe.shared_intermediate,
            "ffn_bias": moe.biases,
            "router_bias": moe.router.logit_bias,
            "shared_gate": moe.shared_gate,
            "correction_bias": moe.router.correction_bias,
            "router_fp32": moe.router.fp32_logits,
        }
    if spec.delta_net is not None:
        fields |= _delta_net(spec, spec.delta_net)
    return ModelShape(
        id=name,
        layers=spec.layers,
        hidden=spec.hidden,
        vocab=spec.vocab,
        context=spec.context,
        q_heads=attention.q_heads,
        qkv_bias=attention.qkv_bias,
        dense_layers=len(dense),
        dense_intermediate=dense[0].intermediate if dense else 0,
        tied_embeddings=spec.tied_embeddings,
        dtype_bytes=dtype_bytes,
        norm_bias=spec.layer_norms,
        lm_head_bias=spec.head_bias,
        **fields,
    )


def _delta_net(spec: ModelSpec, delta_net: DeltaNetSpec) -> dict[str, Any]:
    refs = attention_tensors(spec)
    first = min(delta_net.layers)
    norms = ("input_norm", "post_norm")
    return {
        "delta_layers": len(delta_net.layers),
        "delta_parameters": sum(
            prod(ref.shape) for layer, ref in refs if layer == first and ref.key not in norms
        ),
        "state_bytes": spec.state_bytes,
        "state_row": spec.state_row,
        "fp32_parameters": sum(prod(ref.shape) for _, ref in refs if ref.keep_fp32),
    }


def _shape_of_fields(config: ConfigFile, name: str, dtype_bytes: int) -> ModelShape:
    """Reads the shape of a model that the server does not run."""
    habits = _HABITS.get(str(config.values.get("model_type")), _Habits())
    layers = _size(config, "layers")
    return ModelShape(
        id=name,
        layers=layers,
        vocab=config.integer("vocab_size", None),
        context=_size(config, "context"),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
        dtype_bytes=dtype_bytes,
        lm_head_bias=config.boolean("lm_head_bias", False),
        **_attention(config, habits, _size(config, "hidden")),
        **_window(config, layers),
        **_ffn(config, habits, layers),
    )


def _size(config: ConfigFile, field: str) -> int:
    return config.integer(config.spelling(*_SPELLINGS[field]), None)


def _dtype_bytes(config: ConfigFile) -> int:
    """Bytes per weight in the stored dtype, which is bfloat16 where none is named."""
    field = config.spelling(*_SPELLINGS["dtype"])
    name = config.text(field, "bfloat16")
    if name not in _DTYPE_BYTES:
        raise config.error(field, "must be " + ", ".join(_DTYPE_BYTES))
    return _DTYPE_BYTES[name]


def _attention(config: ConfigFile, habits: _Habits, hidden: int) -> dict[str, Any]:
    heads = _size(config, "heads")
    bias = config.boolean(config.spelling("attention_bias", "qkv_bias"), habits.qkv_bias)
    fields: dict[str, Any] = {
        "hidden": hidden,
        "q_heads": heads,
        "qkv_bias": bias,
        "o_bias": bias and habits.o_bias,
    }
    if config.values.get("kv_lora_rank") is not None:
        rope = config.integer("qk_rope_head_dim", None)
        return fields | {
            "attention": "mla",
            "kv_heads": 1,
            "head_dim": config.integer("qk_nope_head_dim", None) + rope,
            "kv_lora_rank": config.integer("kv_lora_rank", None),
            "q_lora_rank": config.optional_integer("q_lora_rank", None, minimum=0) or 0,
            "qk_rope_head_dim": rope,
            "v_head_dim": config.integer("v_head_dim", None),
        }
    kv_heads = config.optional_integer("num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"must divide the {heads} query heads")
    head_dim = config.optional_integer("head_dim", None)
    if head_dim is None and hidden % heads:
        field = config.spelling(*_SPELLINGS["heads"])
        raise config.error(field, f"must divide the hidden size {hidden}, as head_dim is missing")
    per_head = config.boolean("use_qk_norm", False)
    return fields | {
        "attention": _kind(heads, kv_heads),
        "kv_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "qk_norm": "head" if per_head else habits.qk_norm,
    }


def _window(config: ConfigFile, layers: int) -> dict[str, Any]:
    kinds = config.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise config.error("layer_types", f"must list one kind for each of {layers} layers")
        for kind in kinds:
            if kind not in _LAYER_KINDS:
                raise ConfigError(
                    f"{config.file}: layer_types holds {kind!r}: must be "
                    + " or ".join(_LAYER_KINDS)
                )
    window = config.optional_integer("sliding_window", None, minimum=0) or None
    if not config.boolean("use_sliding_window", True):
        return {}
    sliding = layers if kinds is None else sum(_LAYER_KINDS[kind] for kind in kinds)
    return _sliding(window, sliding, _size(config, "context"))


def _sliding(window: int | None, layers: int, context: int) -> dict[str, Any]:
    """Fields of a sliding window, unless it is as long as the context."""
    if window is None or window >= context or not layers:
        return {}
    return {"sliding_window": window, "sliding_layers": layers}


def _kind(q_heads: int, kv_heads: int) -> AttentionKind:
    return "mha" if kv_heads == q_heads else "mqa" if kv_heads == 1 else "gqa"


def _ffn(config: ConfigFile, habits: _Habits, layers: int) -> dict[str, Any]:
    bias = config.boolean("mlp_bias", False)
    experts_field = config.spelling(*_SPELLINGS["experts"])
    experts = config.optional_integer(experts_field, None, minimum=0) or 0
    if not experts:
        return {
            "dense_layers": layers,
            "dense_intermediate": config.integer("intermediate_size", None),
            "ffn_bias": bias,
        }
    top_k_field = config.spelling(*_SPELLINGS["top_k"])
    top_k = config.integer(top_k_field, None)
    if top_k > experts:
        raise config.error(top_k_field, f"must be at most {experts}, the number of experts")
    size_field = config.spelling("moe_intermediate_size", "intermediate_size")
    moe_intermediate = config.integer(size_field, None)
    dense_layers = _dense_layers(config, layers)
    shared = config.optional_integer("shared_expert_intermediate_size", None, minimum=0)
    gated = bool(shared)
    if shared is None:
        count = config.optional_integer("n_shared_experts", None, minimum=0) or 0
        shared = count * moe_intermediate
    return {
        "experts": experts,
        "top_k": top_k,
        "moe_intermediate": moe_intermediate,
        "shared_intermediate": shared,
        "shared_gate": gated,
        "dense_layers": dense_layers,
        "dense_intermediate": config.integer("intermediate_size", None) if dense_layers else 0,
        "ffn_bias": bias,
        "correction_bias": habits.correction_bias or config.values.get("topk_method") == "noaux_tc",
        "router_fp32": habits.router_fp32,
    }


def _dense_layers(config: ConfigFile, layers: int) -> int:
    """Number of layers of an MoE model that have a dense FFN."""
    types = config.values.get("mlp_layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or set(types) - {"dense", "sparse"}:
            raise config.error("mlp_layer_types", f"must list dense or sparse for {layers} layers")
        return types.count("dense")
    first = config.optional_integer("first_k_dense_replace", None, minimum=0) or 0
    named = config.integers("mlp_only_layers")
    step = config.optional_integer("decoder_sparse_step", None) or 1
    frequency = config.optional_integer("moe_layer_freq", None) or 1
    return sum(
        layer < first or layer in named or bool((layer + 1) % step) or bool(layer % frequency)
        for layer in range(layers)
    )
