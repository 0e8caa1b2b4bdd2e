"""Writes a Qwen3-MoE checkpoint as a GGUF file for llama.cpp: matrices in bf16, bit for bit, norms
and gates in f32.

    python -m benchmark.peers.gguf_file CHECKPOINT FILE
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
NORMS = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


class Tensors:
    """bf16 tensors of a checkpoint, mapped as uint16 arrays, since NumPy has no bf16."""

    def __init__(self, checkpoint: Path) -> None:
        self._places: dict[str, tuple[np.memmap[Any, Any], list[int], int]] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            bytes_ = np.memmap(path, np.uint8, "r")
            header = int(bytes_[:8].view("<u8")[0])
            for name, entry in json.loads(bytes_[8 : 8 + header].tobytes()).items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{path}: {name} is {entry['dtype']}, not BF16")
                first = 8 + header + entry["data_offsets"][0]
                self._places[name] = (bytes_, entry["shape"], first)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        bytes_, shape, first = self._places[f"{name}.weight"]
        count = int(np.prod(shape))
        return bytes_[first : first + 2 * count].view("<u2").reshape(shape)


def _add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, config: dict[str, Any]) -> None:
    """Adds a tokenizer of GPT-2's kind with the words of tokenizer.json. It joins none of them:
    llama.cpp gets token ids here, and no text."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {word["content"] for word in tokenizer["added_tokens"]}
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([control if word in special else normal for word in words])
    # llama.cpp wants one at least; what this one makes is no word, and so falls apart again.
    writer.add_token_merges(["Ā Ā"])
    eos = config["eos_token_id"]
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_pad_token_id(config["pad_token_id"])
    if config["bos_token_id"] is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)


def convert(checkpoint: Path, path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = Tensors(checkpoint)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(part, "qwen3moe")
    writer.add_name(checkpoint.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_vocabulary(writer, checkpoint, config)
    entries = list(_entries(tensors, config))
    for name, _read, shape, is_bf16 in entries:
        if is_bf16:
            bytes_shape = (*shape[:-1], 2 * shape[-1])
            size = int(np.prod(bytes_shape))
            writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), size, BF16)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _name, read, _shape, is_bf16 in entries:
        bits = read()
        writer.write_tensor_data(bits.view(np.uint8) if is_bf16 else _float32(bits))
    writer.close()
    part.rename(path)


Entry = tuple[str, Callable[[], np.ndarray[Any, Any]], tuple[int, ...], bool]


def _entries(tensors: Tensors, config: dict[str, Any]) -> Iterator[Entry]:
    def one(name: str, key: str, is_bf16: bool = True) -> Entry:
        bits = tensors[key]
        return f"{name}.weight", lambda: np.ascontiguousarray(bits), bits.shape, is_bf16

    def experts(name: str, keys: list[str]) -> Entry:
        parts = [tensors[key] for key in keys]
        return f"{name}.weight", lambda: np.stack(parts), (len(parts), *parts[0].shape), True

    yield one("token_embd", "model.embed_tokens")
    yield one("output_norm", "model.norm", False)
    yield one("output", "lm_head")
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        for part, name in ATTENTION.items():
            yield one(f"{theirs}.{name}", f"{ours}.self_attn.{part}_proj")
        for part, name in NORMS.items():
            yield one(f"{theirs}.{name}", f"{ours}.{part}", False)
        for part in ("gate", "up", "down"):
            keys = [
                f"{ours}.mlp.experts.{expert}.{part}_proj"
                for expert in range(config["num_experts"])
            ]
            yield experts(f"{theirs}.ffn_{part}_exps", keys)


def _float32(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide: np.ndarray[Any, Any] = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
