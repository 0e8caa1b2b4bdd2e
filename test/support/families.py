"""Shapes of every family, and transformers' models of them as references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4,
    "beta_slow": 1,
    "rope_theta": 10000.0,
}
DEEPSEEK_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
HUNYUAN_ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}


def longrope(original: int) -> dict[str, Any]:
    """Rotations of heads of 16 features; sequences of more than ``original`` tokens are long."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0, 2.2, 2.5],
        "long_factor": [1.0, 1.6, 2.5, 4.0, 6.0, 9.0, 12.0, 16.0],
        "short_mscale": 1.1,
        "long_mscale": 1.25,
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-tied-dense-between": (
        "qwen3_moe",
        {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
    "qwen3-yarn-window": (
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "rope_parameters": YARN,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "v2-greedy": (
        "deepseek_v2",
        {"num_hidden_layers": 3, "n_shared_experts": 2, "rope_parameters": DEEPSEEK_YARN},
    ),
    "v2-groups-q-lora": (
        "deepseek_v2",
        {
            "q_lora_rank": 24,
            "first_k_dense_replace": 0,
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
        },
    ),
    "v3-groups-q-lora": (
        "deepseek_v3",
        {
            "num_hidden_layers": 3,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "rope_parameters": DEEPSEEK_YARN,
        },
    ),
    "v3-no-q-lora": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "v_head_dim": 8,
            "rope_interleave": False,
            "tie_word_embeddings": True,
        },
    ),
    "glm": ("glm4_moe_lite", {"num_hidden_layers": 3, "v_head_dim": 24, "n_routed_experts": 6}),
    "glm-dense-last": (
        "glm4_moe_lite",
        {
            "mlp_layer_types": ["sparse", "dense"],
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "n_group": 2,
            "rms_norm_eps": 0.01,
            "attention_bias": True,
        },
    ),
    "glm4-moe": ("glm4_moe", {"num_hidden_layers": 3, "n_routed_experts": 6}),
    "glm4-moe-groups": (
        "glm4_moe",
        {
            "use_qk_norm": False,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.25},
        },
    ),
    "qwen2-moe": ("qwen2_moe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "qwen2-moe-dense-between": (
        "qwen2_moe",
        {
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 40,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-next": ("qwen3_next", {"num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3-next-kinds": (
        "qwen3_next",
        {
            "layer_types": [
                "full_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
                "linear_attention",
            ],
            "num_hidden_layers": 5,
            # Every token takes both. One that fell otherwise by rounding would show in the
            # recurrent state of all later tokens.
            "num_experts": 2,
            "mlp_only_layers": [1],
            "linear_conv_kernel_dim": 3,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 24,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "qwen3.5": (
        "qwen3_5_moe_text",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 6,
        },
    ),
    "qwen3": ("qwen3", {"num_hidden_layers": 3, "rope_parameters": YARN}),
    "qwen3-tied": (
        "qwen3",
        {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
    ),
    "llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-biases": (
        "llama",
        {"num_hidden_layers": 3, "attention_bias": True, "head_dim": 24, "rms_norm_eps": 1e-5},
    ),
    "minimax-m2": ("minimax_m2", {"num_local_experts": 6, "num_experts_per_tok": 3}),
    "ernie": ("ernie4_5_moe", {"num_hidden_layers": 3, "moe_num_experts": 6, "moe_k": 3}),
    "ernie-tied-between": (
        "ernie4_5_moe",
        {
            "num_hidden_layers": 5,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 2,
            "moe_num_shared_experts": 0,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "hunyuan": ("hunyuan_v1_moe", {"num_experts": 6, "moe_topk": 3}),
    "hunyuan-alpha": (
        "hunyuan_v1_moe",
        {
            "num_hidden_layers": 3,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": HUNYUAN_ALPHA,
        },
    ),
    "granite": ("granitemoe", {"num_local_experts": 6, "num_experts_per_tok": 3}),
    "granite-tied-biases": (
        "granitemoe",
        {
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "embedding_multiplier": 3,
            "logits_scaling": 0.7,
            "residual_multiplier": 1.0,
        },
    ),
    "mixtral": ("mixtral", {"num_hidden_layers": 3}),
    "mixtral-window": (
        "mixtral",
        {
            "sliding_window": 11,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        },
    ),
    "phimoe-short": ("phimoe", {"num_local_experts": 6, "rope_parameters": longrope(4096)}),
    # transformers chooses by the sequence, and those of all tests are longer than these few tokens.
    "phimoe-long": (
        "phimoe",
        {
            "num_hidden_layers": 3,
            "rope_parameters": longrope(6),
            "router_jitter_noise": 0.3,
            "sliding_window": 11,
            "num_key_value_heads": 4,
        },
    ),
    "phimoe-plain": (
        "phimoe",
        {"attention_bias": False, "lm_head_bias": False, "tie_word_embeddings": True},
    ),
    "llama4": (
        "llama4_text",
        {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_local_experts": 6},
    ),
    "llama4-plain": (
        "llama4_text",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 11,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "num_attention_heads": 6,
            "intermediate_size": 40,
        },
    ),
    "gpt-oss-kinds": (
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
            "sliding_window": 5,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
    ),
    "olmoe": ("olmoe", {"num_key_value_heads": 2, "clip_qkv": 1.5, "attention_bias": True}),
    "olmoe-norm": (
        "olmoe",
        {
            "num_experts": 6,
            "norm_topk_prob": True,
            "num_experts_per_tok": 3,
            "rope_parameters": LLAMA3,
        },
    ),
}
FAMILIES = sorted({family for family, _ in SHAPES.values()})


def reference_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for module in model.modules():
        if type(module).__name__ == "DeepseekV2Moe":
            # transformers 5.12.1 reads this when routing is group-limited, and never sets it.
            module.num_experts = model.config.n_routed_experts
        if type(module).__name__ == "DeepseekV2Attention":
            # It also leaves YaRN's mscale_all_dim out of the softmax scale; later releases do not.
            rope = model.config.rope_parameters
            if rope.get("mscale_all_dim"):
                module.scaling *= yarn_get_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    model.eval()
    return model
