"""Turns the metadata of a GGUF file into the fields of the config.json that it was made from.

Families are read from these fields as from any config.json, so that every check holds. What
llama.cpp does without a key (such as qwen3moe's renormalised routing) is filled in here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import ConfigFile
from crosspool.models.gguf_blocks import GGUF_BLOCKS
from crosspool.models.gguf_header import GGUFHeader, gguf_files, read_header

GGUF = "gguf"
"""Field for what no config.json has: the file's ``architecture``, its number of ``layers``, the
``types`` of its tensors by their names in the file, and the ``ffn_group``, the most weights of FFN
tensors that share a scale."""
_SIGMOID = 2
"""Value of ``expert_gating_func`` for DeepSeek-V3's routing."""
_ALL_F32 = 0
"""Value of ``general.file_type``."""


def config_of(path: Path) -> ConfigFile:
    """Returns the config of a checkpoint: its config.json, of a multimodal model the part for its
    language model, or what a GGUF file says.

    Raises ConfigError for a file that cannot be read, and for an architecture of GGUF that is not
    supported."""
    files = gguf_files(path)
    if not files:
        return ConfigFile(path / "config.json").language_part()
    header = read_header(files)
    return ConfigFile(files[0], _fields(header))


def _fields(header: GGUFHeader) -> dict[str, Any]:
    architecture = header.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{header.files[0]}: general.architecture={architecture!r} is not supported; supported "
            f"are {', '.join(sorted(_ARCHITECTURES))}"
        )
    get = _Keys(header, architecture)
    common = {
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "vocab_size": len(header.metadata.get("tokenizer.ggml.tokens", [])) or get("vocab_size"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(get),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "eos_token_id": _ends(header),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        GGUF: {
            "architecture": architecture,
            "layers": get("block_count"),
            "types": {name: tensor.type for name, tensor in header.tensors.items()},
            "ffn_group": _ffn_group(header),
        },
        "dtype": "float32" if header.metadata.get("general.file_type") == _ALL_F32 else "bfloat16",
    }
    fields = common | _ARCHITECTURES[architecture](get)
    # Families have a q_lora_rank unless it is null.
    return {
        name: value for name, value in fields.items() if value is not None or name == "q_lora_rank"
    }


class _Keys:
    """Metadata of the architecture: ``get("block_count")`` is ``qwen3moe.block_count``."""

    def __init__(self, header: GGUFHeader, architecture: str) -> None:
        self.header = header
        self._architecture = architecture

    def __call__(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self._architecture}.{key}", default)

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor of this name."""
        return tensor in self.header.tensors


def _ffn_group(header: GGUFHeader) -> int:
    types = {tensor.type for name, tensor in header.tensors.items() if ".ffn_" in name}
    return max((GGUF_BLOCKS[name].held.group for name in types if name in GGUF_BLOCKS), default=1)


def _ends(header: GGUFHeader) -> list[int] | None:
    """The tokens that end an answer: those that end a text and a turn."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
    found = dict.fromkeys(header.metadata[key] for key in keys if key in header.metadata)
    return list(found) or None


def _rope_scaling(get: _Keys) -> dict[str, Any] | None:
    kind = get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    scaling = {"type": kind, "factor": get("rope.scaling.factor")}
    if (original := get("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    # llama.cpp keeps 0.1 * mscale_all_dim, of models whose mscale is the same.
    if multiplier := get("rope.scaling.yarn_log_multiplier"):
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * multiplier, 6)
    return scaling


def _divisors(get: _Keys) -> dict[str, Any] | None:
    """The rotations of Llama 3.1, of which the file has the divisors that its converter computed.
    Raises ConfigError where they are no floats, or the metadata scale the rotations, too."""
    tensor = get.header.tensors.get("rope_freqs.weight")
    if tensor is None:
        return _rope_scaling(get)
    where = f"{tensor.file}: the tensor {tensor.name}"
    if tensor.type != "F32":
        raise ConfigError(f"{where} is {tensor.type}, it must be F32")
    if (scaling := _rope_scaling(get)) is not None:
        raise ConfigError(f"{where} cannot be combined with rope.scaling.type={scaling['type']!r}")
    from numpy import fromfile

    count = tensor.bytes // 4
    divisors = fromfile(tensor.file, "<f4", count, offset=tensor.offset).tolist()
    return {"type": "divided", "divisors": divisors}


def _qwen3moe(get: _Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "head_dim": get("attention.key_length"),
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "intermediate_size": get("feed_forward_length"),
        "norm_topk_prob": True,
    }


def _olmoe(get: _Keys) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "intermediate_size": get("feed_forward_length"),
        "norm_topk_prob": False,
        "clip_qkv": get("attention.clamp_kqv"),
    }


def _qwen2moe(get: _Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": get("expert_shared_feed_forward_length"),
        "intermediate_size": get("feed_forward_length"),
        "norm_topk_prob": False,
        "qkv_bias": get.has("blk.0.attn_q.bias"),
    }


def _qwen3(get: _Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "head_dim": get("attention.key_length"),
        "intermediate_size": get("feed_forward_length"),
        "attention_bias": get.has("blk.0.attn_q.bias"),
    }


def _deepseek_ffn(get: _Keys) -> dict[str, Any]:
    """The layers and their FFNs of the families that have DeepSeek's fields for them."""
    return {
        "num_hidden_layers": get("block_count", 0) - get("nextn_predict_layers", 0),
        "n_routed_experts": get("expert_count"),
        "n_shared_experts": get("expert_shared_count", 0),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "intermediate_size": get("feed_forward_length"),
        "first_k_dense_replace": get("leading_dense_block_count", 0),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
        "norm_topk_prob": get("expert_weights_norm", False),
        "n_group": get("expert_group_count", 1),
        "topk_group": get("expert_group_used_count", 1),
    }


def _glm4moe(get: _Keys) -> dict[str, Any]:
    head_dim, rotated = get("attention.key_length"), get("rope.dimension_count")
    return {
        "model_type": "glm4_moe",
        "head_dim": head_dim,
        "partial_rotary_factor": rotated / head_dim if rotated and head_dim else None,
        "attention_bias": get.has("blk.0.attn_q.bias"),
        "use_qk_norm": get.has("blk.0.attn_q_norm.weight"),
    } | _deepseek_ffn(get)


def _minimax_m2(get: _Keys) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        "head_dim": get("attention.key_length"),
        "rotary_dim": get("rope.dimension_count"),
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "intermediate_size": get("expert_feed_forward_length"),
    }


def _hunyuan_moe(get: _Keys) -> dict[str, Any]:
    """The file's ``rope.freq_base`` has the factor ``alpha`` already."""
    return {
        "model_type": "hunyuan_v1_moe",
        "head_dim": get("attention.key_length"),
        "attention_bias": get.has("blk.0.attn_q.bias"),
        "num_experts": get("expert_count"),
        "moe_topk": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "intermediate_size": get("expert_shared_feed_forward_length"),
        "num_shared_expert": get("expert_shared_count"),
    }


def _llama(get: _Keys) -> dict[str, Any]:
    common = {
        "head_dim": get("attention.key_length", get("rope.dimension_count")),
        "rope_scaling": _divisors(get),
    }
    if not get("expert_count"):
        return common | {
            "model_type": "llama",
            "intermediate_size": get("feed_forward_length"),
            "attention_bias": get.has("blk.0.attn_q.bias"),
        }
    return common | {
        "model_type": "mixtral",
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "intermediate_size": get("feed_forward_length"),
    }


def _gpt_oss(get: _Keys) -> dict[str, Any]:
    """The models' own YaRN does not round the ends of its ramp, whatever llama.cpp does."""
    scaling = _rope_scaling(get)
    return {
        "model_type": "gpt_oss",
        "head_dim": get("attention.key_length"),
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "intermediate_size": get("expert_feed_forward_length"),
        "sliding_window": get("attention.sliding_window"),
        "attention_bias": get.has("blk.0.attn_q.bias"),
        "rope_scaling": None if scaling is None else scaling | {"truncate": False},
    }


def _ernie4_5_moe(get: _Keys) -> dict[str, Any]:
    return {
        "model_type": "ernie4_5_moe",
        "head_dim": get("attention.key_length"),
        "moe_num_experts": get("expert_count"),
        "moe_k": get("expert_used_count"),
        "moe_num_shared_experts": get("expert_shared_count", 0),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "intermediate_size": get("feed_forward_length"),
        "moe_layer_start_index": get("leading_dense_block_count", 0),
        "moe_layer_interval": get("interleave_moe_layer_step", 1),
    }


def _granitemoe(get: _Keys) -> dict[str, Any]:
    if shared := get("expert_shared_feed_forward_length"):
        raise ConfigError(
            f"{get.header.files[0]}: granitemoe.expert_shared_feed_forward_length={shared}: models "
            "with a shared expert are not supported"
        )
    return {
        "model_type": "granitemoe",
        "attention_multiplier": get("attention.scale"),
        "embedding_multiplier": get("embedding_scale"),
        "residual_multiplier": get("residual_scale"),
        "logits_scaling": get("logit_scale"),
        "attention_bias": get.has("blk.0.attn_q.bias"),
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "intermediate_size": get("feed_forward_length"),
    }


def _deepseek2(get: _Keys) -> dict[str, Any]:
    rope = get("rope.dimension_count", 64)
    key = get("attention.key_length_mla", get("attention.key_length"))
    sigmoid = get("expert_gating_func") == _SIGMOID
    fields = {
        "num_key_value_heads": get("attention.head_count"),
        "q_lora_rank": get("attention.q_lora_rank"),
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": None if key is None else key - rope,
        "v_head_dim": get("attention.value_length_mla", get("attention.value_length")),
    } | _deepseek_ffn(get)
    if not sigmoid:
        fields["topk_method"] = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
    return {"model_type": "deepseek_v3" if sigmoid else "deepseek_v2"} | fields


_ARCHITECTURES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "qwen3moe": _qwen3moe,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "glm4moe": _glm4moe,
    "minimax-m2": _minimax_m2,
    "hunyuan-moe": _hunyuan_moe,
    "olmoe": _olmoe,
    "llama": _llama,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
    "ernie4_5-moe": _ernie4_5_moe,
    "granitemoe": _granitemoe,
}
