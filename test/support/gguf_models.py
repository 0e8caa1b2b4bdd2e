"""GGUF models of several families, of the types that llama.cpp mixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from make_random_checkpoint import make_random_checkpoint
from support import gguf_files
from support.families import HUNYUAN_ALPHA, LLAMA3

_K = {"hidden_size": 256, "intermediate_size": 512}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, str], dict[str, Any]]] = {
    # As llama.cpp mixes them for Q4_K_M: by part and role.
    "qwen3 mixed": (
        "qwen3_moe",
        _K | {"moe_intermediate_size": 512, "head_dim": 64},
        {"ffn_down": "Q6_K", "attn_v": "Q6_K", "attn_k": "Q5_K", "output": "Q8_0", "": "Q4_K"},
        {},
    ),
    "mixtral": ("mixtral", {}, {"token_embd": "F16", "ffn_down": "Q8_0", "": "Q4_0"}, {}),
    "qwen2 moe": ("qwen2_moe", {"shared_expert_intermediate_size": 64}, {"": "Q8_0"}, {}),
    "qwen3 dense": ("qwen3", {"tie_word_embeddings": True}, {"": "Q8_0"}, {}),
    "glm4 moe": ("glm4_moe", {}, {"": "Q8_0"}, {}),
    "minimax": ("minimax_m2", {}, {"": "Q8_0"}, {}),
    "hunyuan": ("hunyuan_v1_moe", {"rope_parameters": HUNYUAN_ALPHA}, {"": "Q8_0"}, {}),
    "llama dense": ("llama", {"num_key_value_heads": 4}, {"": "Q8_0"}, {}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}, {"": "Q8_0"}, {}),
    "gpt-oss": (
        "gpt_oss",
        {"num_hidden_layers": 3, "intermediate_size": 64},
        {"exps": "MXFP4", "": "Q8_0"},
        {},
    ),
    "gpt-oss q8": ("gpt_oss", {}, {"": "Q8_0"}, {}),
    "ernie": ("ernie4_5_moe", {"num_hidden_layers": 3}, {"": "Q8_0"}, {}),
    "granite": ("granitemoe", {"num_local_experts": 6}, {"": "Q8_0"}, {}),
    "olmoe split": ("olmoe", {}, {"token_embd": "BF16", "": "Q8_0"}, {"max_tensors": 11}),
    "v2": (
        "deepseek_v2",
        {"kv_lora_rank": 64, "qk_nope_head_dim": 32},
        {"": "Q8_0"},
        {"split_kv_b": True},
    ),
    "v3 whole kv_b": ("deepseek_v3", {}, {"ffn": "MXFP4", "": "Q8_0"}, {"split_kv_b": False}),
}


def make_gguf(case: str, out: Path) -> tuple[Path, Path]:
    """Writes a GGUF model, and a checkpoint of the floats that it stands for; returns the (first)
    GGUF file and the checkpoint."""
    family, overrides, kinds, options = CASES[case]
    sizes = {"vocab_size": 160} | overrides
    path = make_random_checkpoint(family, out / "random", sizes, "float32", seed=3)

    def kind_of(name: str) -> str:
        return next(kind for part, kind in kinds.items() if part in name)

    return gguf_files.convert(path, out / "made", kind_of, **options)
