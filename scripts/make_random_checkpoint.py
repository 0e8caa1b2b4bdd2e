"""Writes a checkpoint with random weights, of any shape, in the layout of the model hub.

The tensors carry the names that published checkpoints use (one tensor per expert and projection),
are drawn one shard at a time, so that large checkpoints need little memory, and depend only on the
seed, the name and the shape of each tensor. They are scaled so that every part of the model matters
for the logits: norm weights spread around one, routers that choose, correction biases that move the
choice.

Examples:

    # The smallest: two layers, four experts, one file.
    python scripts/make_random_checkpoint.py --family qwen3_moe --out /tmp/tiny-qwen

    # The attention and expert shape of Qwen3-30B-A3B, with four layers only, in 2 GB shards.
    python scripts/make_random_checkpoint.py --family qwen3_moe --out /tmp/qwen-4l \\
        --set hidden_size=2048 --set num_hidden_layers=4 --set num_attention_heads=32 \\
        --set num_key_value_heads=4 --set head_dim=128 --set num_experts=128 \\
        --set num_experts_per_tok=8 --set moe_intermediate_size=768 --set vocab_size=151936 \\
        --shard-size 2GB

    # DeepSeek-V3 in float32, with the tokenizer (and vocabulary size) of a bundled model.
    python scripts/make_random_checkpoint.py --family deepseek_v3 --out /tmp/v3 --dtype float32 \\
        --set num_hidden_layers=3 --seed 7 --tokenizer python/crosspool/demo/tiny-deepseek-v2
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_DENSE: dict[str, Any] = {n: v for n, v in _COMMON.items() if n != "num_experts_per_tok"} | {
    "num_key_value_heads": 2,
}
_MLA: dict[str, Any] = _COMMON | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SIGMOID_ROUTER: dict[str, Any] = {
    "q_lora_rank": 32,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
}

# The model_type of a configuration, and its defaults for --set.
_DELTA_NETS = _COMMON | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": _COMMON
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v2": _MLA | {"q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v3": _MLA | _SIGMOID_ROUTER | {"routed_scaling_factor": 2.5},
    "glm4_moe_lite": _MLA | _SIGMOID_ROUTER | {"routed_scaling_factor": 1.8},
    "glm4_moe": _COMMON
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "qwen2_moe": _COMMON
    | {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False,
    },
    "qwen3_next": _DELTA_NETS,
    "qwen3_5_moe_text": _DELTA_NETS,
    "qwen3": _DENSE | {"head_dim": 16},
    "llama": _DENSE,
    "minimax_m2": _COMMON
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "partial_rotary_factor": 0.5,
        },
    },
    "ernie4_5_moe": _DENSE
    | {
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
    },
    "hunyuan_v1_moe": _DENSE
    | {"head_dim": 16, "num_experts": 4, "moe_topk": 2, "intermediate_size": 32},
    "granitemoe": _COMMON
    | {
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "intermediate_size": 32,
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "phimoe": _COMMON
    | {
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "intermediate_size": 32,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.1,
    },
    "llama4_text": _COMMON
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 8,
        "floor_scale": 8,
    },
    "mixtral": _COMMON | {"num_key_value_heads": 2, "num_local_experts": 4},
    "gpt_oss": _COMMON
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size": 32,
        "sliding_window": 8,
    },
    "olmoe": _COMMON | {"num_key_value_heads": 4, "num_experts": 4, "intermediate_size": 32},
}
# Of these any other family takes the fields that its configuration class has.
_SMALL = _MLA | _SIGMOID_ROUTER | {"head_dim": 16, "num_experts": 4, "num_local_experts": 4}
_AS_PUBLISHED = ("gpt_oss", "llama4_text", "qwen3_5_moe_text")
"""Families whose published tensors are those of transformers."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _config(family: str, overrides: dict[str, Any], dtype: str) -> PreTrainedConfig:
    if family not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no model type {family!r}")
    config_class = CONFIG_MAPPING[family]
    class_name, fields = config_class.__name__, set(config_class().to_dict())
    small = {name: value for name, value in _SMALL.items() if name in fields}
    defaults = FAMILIES.get(family, small)
    known = set(defaults) | fields | {"rope_theta", "rope_scaling"}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"{class_name} has no setting {', '.join(unknown)}")
    values = defaults | overrides
    if family == "glm4_moe_lite" and "mlp_layer_types" not in overrides:
        dense = min(values["first_k_dense_replace"], values["num_hidden_layers"])
        sparse = values["num_hidden_layers"] - dense
        values["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * sparse
    config = config_class(**values)
    config.dtype = dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    return config


def save_hub_config(config: PreTrainedConfig, out: Path) -> None:
    """Writes ``config.json`` and ``generation_config.json`` with the keys of published ones.

    transformers 5 renames ``num_experts`` of Qwen3-MoE and moves ``rope_theta`` into
    ``rope_parameters``; other readers look for the published keys, so both are written.
    """
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    path = out / "config.json"
    values = json.loads(path.read_text())
    values["rope_theta"] = values["rope_parameters"]["rope_theta"]
    if config.model_type == "qwen3_moe":
        values["num_experts"] = values.pop("num_local_experts")
    path.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")


def hub_tensors(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a published checkpoint of this shape, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    mixtral = config.model_type in ("mixtral", "minimax_m2", "phimoe")
    gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    tensors: dict[str, torch.Tensor] = {}
    for fused_name, tensor in model.state_dict().items():
        if fused_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = fused_name.replace(".mlp.", ".block_sparse_moe.") if mixtral else fused_name
        name = name.replace(".gate.moe_statics.", ".moe_statics.")  # ERNIE
        if config.model_type == "phimoe":
            name = name.replace(".router.", ".gate.")
        prefix, _, fused = name.rpartition(".experts.")
        if config.model_type in _AS_PUBLISHED:
            tensors[name] = tensor
        elif fused == "gate_up_proj":
            half = tensor.shape[1] // 2
            for expert in range(tensor.shape[0]):
                tensors[f"{prefix}.experts.{expert}.{gate}.weight"] = tensor[expert, :half]
                tensors[f"{prefix}.experts.{expert}.{up}.weight"] = tensor[expert, half:]
        elif fused == "down_proj":
            for expert in range(tensor.shape[0]):
                tensors[f"{prefix}.experts.{expert}.{down}.weight"] = tensor[expert]
        elif name.endswith(".e_score_correction_bias"):
            tensors[name] = tensor.float()
        else:
            tensors[name] = tensor
    return tensors


def _draw(name: str, like: torch.Tensor, seed: int, zero_centred: bool) -> torch.Tensor:
    """Random values on the scale that keeps activations near one and the logits decisive.
    ``zero_centred``: whether the model adds one to the weights of its norms."""
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    values = torch.randn(like.shape, generator=generator)
    if name.endswith("bias"):
        values *= 0.1
    elif name.endswith(".A_log"):  # states that last for some tens of tokens
        values -= 3
    elif like.dim() == 1:
        values = (1 + 0.2 * values).clamp(min=0.3)
        if zero_centred and not name.endswith("linear_attn.norm.weight"):
            values -= 1
    elif re.search(r"(embed_tokens|lm_head)\.weight$", name):
        values *= 3 * like.shape[-1] ** -0.5
    elif re.search(r"\.(gate|gate\.wg|router|router\.layer)\.weight$", name):
        values *= 2 * like.shape[-1] ** -0.5
    elif name.endswith(".conv1d.weight"):
        values *= like.shape[-1] ** -0.5
    elif like.dim() == 3:  # fused experts, [experts, k, n]
        values *= (3 if "gate_up" in name else 0.2) * like.shape[1] ** -0.5  # some are clamped
    else:
        values *= like.shape[-1] ** -0.5
    return values.to(like.dtype)


def _shards(tensors: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    used = 0
    for name, tensor in tensors.items():
        if shard and used + tensor.nbytes > limit:
            yield shard
            shard, used = {}, 0
        shard[name] = tensor
        used += tensor.nbytes
    yield shard


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", str(size).strip().upper())
    if not match:
        raise ValueError(f"not a size: {size!r} (write for example 50MB)")
    return int(match[1]) * _SIZES.get(match[2], 1)


def make_random_checkpoint(
    family: str,
    out: str | Path,
    overrides: dict[str, Any] | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    *,
    max_shard_size: int | str = "50MB",
    tokenizer: str | Path | None = None,
) -> Path:
    """Writes a random checkpoint of ``family`` to the new folder ``out`` and returns ``out``.

    ``overrides`` are settings of the family's configuration class. A ``tokenizer`` folder is copied
    along and sets the vocabulary size and the special token ids that ``overrides`` leave open.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty")
    settings: dict[str, Any] = {}
    if tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        settings["vocab_size"] = len(loaded)
        for token_id in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings[token_id] = getattr(loaded, token_id)
    config = _config(family, settings | (overrides or {}), dtype)
    tensors = hub_tensors(config, DTYPES[dtype])
    shards = list(_shards(tensors, _bytes(max_shard_size)))
    out.mkdir(parents=True, exist_ok=True)
    save_hub_config(config, out)
    if tokenizer is not None:
        for pattern in ("tokenizer*", "chat_template*", "special_tokens_map.json"):
            for path in Path(tokenizer).glob(pattern):
                shutil.copy(path, out)

    centred = config.model_type in ("qwen3_next", "qwen3_5_moe_text")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        drawn = {name: _draw(name, tensor, seed, centred) for name, tensor in shard.items()}
        save_file(drawn, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return out


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main() -> None:
    """Parses the command line and writes the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", required=True, help="model_type: " + ", ".join(FAMILIES))
    parser.add_argument("--out", required=True, type=Path, help="new folder for the checkpoint")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="a setting of the configuration, its value in JSON (repeat for more settings)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="50MB", help="at most this much per file")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer is copied along")
    args = parser.parse_args()
    try:
        make_random_checkpoint(
            args.family,
            args.out,
            dict(args.settings),
            args.dtype,
            args.seed,
            max_shard_size=args.shard_size,
            tokenizer=args.tokenizer,
        )
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.1f} MB in {len(list(args.out.iterdir()))} files")


if __name__ == "__main__":
    main()
