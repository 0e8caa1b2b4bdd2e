"""Writes GGUF files from Hugging Face checkpoints, by the rules of llama.cpp's converter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_ROUND = {"Q4_0", "Q8_0", "BF16", "F16", "MXFP4"}
"""Types that the ``gguf`` package itself can write."""
_ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
    "hunyuan_v1_moe": "hunyuan-moe",
    "llama": "llama",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "ernie4_5_moe": "ernie4_5-moe",
    "granitemoe": "granitemoe",
}
_PERMUTED = ("llama", "granitemoe")


def blocks(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Values in blocks of a type. K-quants get random codes and scales of about the right size:
    ``gguf`` cannot write them, and any code stands for a value."""
    if kind == "F32":
        return values.astype(np.float32)
    if kind in _ROUND:
        return quantize(values.astype(np.float32), Type[kind])
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    *outer, width = values.shape
    random = np.random.default_rng(abs(int(values.flat[0] * 1e6)))
    stored = random.integers(0, 256, (*outer, width // block, size), np.uint8)
    scale = np.abs(values).reshape(*outer, width // block, block).max(-1, keepdims=True)
    if kind == "Q6_K":  # scales are signed bytes, d comes last
        stored[..., -2:] = (scale / 2**12).astype(np.float16).view(np.uint8)
    else:  # d and dmin, for scales and minima of six bits
        stored[..., :2] = (scale / 2**9).astype(np.float16).view(np.uint8)
        stored[..., 2:4] = (scale / 2**6).astype(np.float16).view(np.uint8)
    return stored.reshape(*outer, -1)


def convert(
    path: Path,
    out: Path,
    kind_of: Callable[[str], str],
    *,
    split_kv_b: bool = True,
    max_tensors: int = 0,
) -> tuple[Path, Path]:
    """Writes a GGUF model from a checkpoint in float32 of one file, and a checkpoint of the floats
    that the GGUF stands for; returns the (first) GGUF file and the checkpoint.

    ``kind_of``: type of each tensor by its name in the GGUF. ``split_kv_b``: as the converter does
    since MLA is absorbed. ``max_tensors``: tensors of a file of a split; 0: one file."""
    config = json.loads((path / "config.json").read_text())
    architecture = _ARCHITECTURES[config["model_type"]]
    layers = config["num_hidden_layers"]
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], layers)
    out.mkdir(parents=True)
    file = out / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=max_tensors)
    _metadata(writer, config, architecture)
    if (path / "tokenizer.json").exists():
        add_tokenizer(writer, path)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"token {i}" for i in range(config["vocab_size"])])

    floats: dict[str, Tensor] = {}
    experts: dict[str, dict[int, tuple[str, Tensor]]] = {}

    def add(name: str, tensor: Tensor) -> Tensor:
        matrix = tensor.dim() > 1 and not name.endswith(".bias")
        kind = kind_of(name) if matrix and ".ffn_gate_inp" not in name else "F32"
        stored = blocks(np.ascontiguousarray(tensor.float().numpy()), kind)
        writer.add_tensor(name, stored, raw_dtype=Type[kind])
        values = dequantize(stored, Type[kind]) if kind != "F32" else stored
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(tensor.shape)

    def named(name: str) -> str:
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        return str(found)

    for name, tensor in load_file(path / "model.safetensors").items():
        parts = name.split(".")
        if parts[-1].startswith("gate_up_proj") or parts[-2] == "input_linear":
            floats[name] = _taken_apart(name, tensor, lambda of, part: add(named(of), part))
            continue
        if parts[-1] in ("down_proj", "down_proj_bias"):  # of gpt-oss
            end = "bias" if parts[-1].endswith("_bias") else "weight"
            new = named(".".join((*parts[:-1], "down_proj", end)))
            floats[name] = _turned(add(new, _turned(tensor)))
            continue
        if "experts" in parts:
            at = parts.index("experts")
            merged = ".".join((*parts[: at + 1], *parts[at + 2 :]))
            experts.setdefault(merged, {})[int(parts[at + 1])] = name, tensor
            continue
        key = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if parts[-1] == "sinks":
            key += ".weight"
        new = named(key)
        if architecture in _PERMUTED and parts[-2] in ("q_proj", "k_proj"):
            which = "num_attention_heads" if parts[-2] == "q_proj" else "num_key_value_heads"
            heads = config[which]
            stored = add(new, _permuted(tensor, heads))
            half = tensor.shape[0] // heads // 2
            floats[name] = stored.view(heads, half, 2, -1).transpose(1, 2).reshape(tensor.shape)
        elif parts[-2] == "kv_b_proj" and split_kv_b:
            nope, heads = config["qk_nope_head_dim"], config["num_attention_heads"]
            k, v = tensor.view(heads, -1, tensor.shape[1]).split(
                [nope, config["v_head_dim"]], dim=1
            )
            k = add(new.replace("kv_b", "k_b"), k.transpose(1, 2).contiguous())
            v = add(new.replace("kv_b", "v_b"), v.contiguous())
            floats[name] = torch.cat((k.transpose(1, 2), v), dim=1).reshape(tensor.shape)
        elif parts[-2] == "moe_statics":  # the converter has no rows of one
            floats[name] = add(new, tensor[0])[None]
        else:
            floats[name] = add(new, tensor)
    if config["rope_parameters"].get("rope_type") == "llama3":
        add("rope_freqs.weight", _divisors(path))
    for merged, of_expert in experts.items():
        stacked = add(named(merged), torch.stack([of_expert[i][1] for i in range(len(of_expert))]))
        for i, (name, _) in of_expert.items():
            floats[name] = stacked[i]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reference = out / "floats"
    shutil.copytree(path, reference)
    save_file(
        {name: tensor.contiguous() for name, tensor in floats.items()},
        reference / "model.safetensors",
        {"format": "pt"},
    )
    return next(iter(sorted(out.glob("*.gguf")))), reference


def _taken_apart(name: str, tensor: Tensor, add: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Writes gate and up of all experts, which the checkpoint has in one tensor, and returns what
    was written in that order: rows in turns in gpt-oss, one half each in Granite-MoE."""
    out = torch.empty(tensor.shape)
    if "input_linear" in name:
        half, stem = tensor.shape[1] // 2, name.removesuffix("input_linear.weight")
        for at, part in ((slice(half), "w1"), (slice(half, None), "w3")):
            out[:, at] = add(f"{stem}experts.{part}.weight", tensor[:, at].contiguous())
        return out
    stem, _, end = name.rpartition("gate_up_proj")
    for first, part in enumerate(("gate_proj", "up_proj")):
        stored = add(f"{stem}{part}.{'bias' if end else 'weight'}", _turned(tensor[..., first::2]))
        out[..., first::2] = _turned(stored)
    return out


def _turned(tensor: Tensor) -> Tensor:
    """Matrices of all experts with rows and columns exchanged; biases as they are."""
    return tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor.contiguous()


def _divisors(path: Path) -> Tensor:
    """What divides the frequencies of the rotations, by transformers' own."""
    config = AutoConfig.from_pretrained(path)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled))
    base = torch.tensor(config.rope_parameters["rope_theta"], dtype=torch.float64)
    return (base ** -exponents.double() / scaled.double()).float()


def add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    """Writes a tokenizer as the converter's ``_set_vocab_gpt2`` or ``_set_vocab_sentencepiece``
    does: tokens, their kinds, and merges or scores. ``path``: a folder with one that cuts text as
    GPT-2's does, or with a tokenizer.model."""
    fast = json.loads((path / "tokenizer.json").read_text())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    numbers = {
        **fast["model"]["vocab"],
        **{one["content"]: one["id"] for one in fast["added_tokens"]},
    }
    tokens = sorted(numbers, key=lambda token: int(numbers[token]))
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    if (path / "tokenizer.model").exists():
        pieces = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        scores = [-1000.0] * len(tokens)
        for number in range(pieces.vocab_size()):
            assert tokens[number] == pieces.id_to_piece(number)
            scores[number] = pieces.get_score(number)
            if pieces.is_byte(number):
                kinds[number] = gguf.TokenType.BYTE
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_bos_token(settings["add_bos_token"])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in fast["model"]["merges"]])
    for one in fast["added_tokens"]:
        kinds[one["id"]] = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if settings["bos_token"] is not None:
        writer.add_bos_token_id(numbers[settings["bos_token"]])
    writer.add_pad_token_id(numbers[settings["pad_token"]])
    writer.add_chat_template((path / "chat_template.jinja").read_text())


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """The converter's ``LlamaModel.permute``."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _metadata(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    writer.add_file_type(7)
    ends = config["eos_token_id"]
    first, *others = ends if isinstance(ends, list) else [ends]
    writer.add_eos_token_id(first)
    for other in others:
        writer.add_eot_token_id(other)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rotations = config["rope_parameters"]
    base = config["rope_theta"]
    if "alpha" in rotations:  # as the converter has it for Hunyuan
        base *= rotations["alpha"] ** (config["head_dim"] / (config["head_dim"] - 2))
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_freq_base(base)
    writer.add_feed_forward_length(config["intermediate_size"])
    if rotations.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rotations["factor"])
        writer.add_rope_scaling_orig_ctx_len(rotations["original_max_position_embeddings"])
    top_k = ("num_experts_per_tok", "moe_topk", "moe_k")
    if chosen := next((config[name] for name in top_k if config.get(name)), 0):
        writer.add_expert_used_count(chosen)
    if architecture == "deepseek2":
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        writer.add_head_count_kv(1)
        writer.add_kv_lora_rank(config["kv_lora_rank"])
        if config.get("q_lora_rank"):
            writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_key_length(config["kv_lora_rank"] + rope)
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(config["v_head_dim"])
        writer.add_rope_dimension_count(rope)
        writer.add_expert_count(config["n_routed_experts"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
        sigmoid = config["model_type"] == "deepseek_v3"
        writer.add_expert_gating_func(
            gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
        )
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = rotations.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_dim * rotated))
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if count := next((config[name] for name in experts if config.get(name)), 0):
        writer.add_expert_count(count)
    if config.get("head_dim") and architecture != "llama":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if architecture == "minimax-m2":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if architecture == "hunyuan-moe":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
        writer.add_expert_shared_count(1)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_expert_shared_count(config["moe_num_shared_experts"])
    if architecture == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if architecture == "glm4moe":
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
