"""Compares the ModelSpec of a config.json with transformers' own reading of the same fields."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crosspool.config.deployment import ConfigError
from crosspool.kernels.rope import unscaled_frequencies
from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.schemes import MXFP4
from crosspool.models.spec import (
    DenseFFN,
    GQASpec,
    MLASpec,
    ModelSpec,
    MoEFFN,
    RopeSpec,
    TemperatureTuning,
)
from crosspool.ranks.host.attention import frequencies
from make_random_checkpoint import hub_tensors, make_random_checkpoint
from support.families import FAMILIES, longrope
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = {family: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in FAMILIES}
_NEEDED = {"num_experts_per_tok": 6, "n_routed_experts": 64}
"""Fields for which a family may have no default: transformers then cannot build the model."""


def _write(folder: Path, family: str, **fields: Any) -> Path:
    config = {"architectures": [ARCHITECTURES[family]], "model_type": family, "dtype": "bfloat16"}
    defaults = CONFIG_MAPPING[family]()
    needed = {n: value for n, value in _NEEDED.items() if getattr(defaults, n, value) is None}
    needed |= _WITHOUT_DEFAULTS.get(family, {})
    (folder / "config.json").write_text(json.dumps(config | needed | fields))
    return folder


_WITHOUT_DEFAULTS = {"glm4_moe": {"head_dim": 128}}
"""Fields whose defaults in transformers make no model."""


def _check_against(spec: ModelSpec, config: PreTrainedConfig) -> None:
    assert spec.family == config.model_type
    assert spec.hidden == config.hidden_size
    assert spec.vocab == config.vocab_size
    assert spec.layers == config.num_hidden_layers
    assert spec.context == config.max_position_embeddings
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.tied_embeddings == config.tie_word_embeddings
    eos = config.eos_token_id
    assert spec.eos_token_ids == (() if eos is None else (eos,))
    assert spec.embed_scale == getattr(config, "embedding_multiplier", 1.0)
    assert spec.logit_scale == 1 / getattr(config, "logits_scaling", 1.0)
    mixes_sparsely = config.model_type == "phimoe"
    assert spec.layer_norms == mixes_sparsely
    assert spec.head_bias == getattr(config, "lm_head_bias", False)
    attention = spec.attention
    assert attention.q_heads == config.num_attention_heads
    if isinstance(attention, MLASpec):
        for field in (
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ):
            assert getattr(attention, field) == getattr(config, field)
        assert attention.rope.interleaved == getattr(config, "rope_interleave", True)
    else:
        assert attention.kv_heads == config.num_key_value_heads
        assert attention.out_scale == getattr(config, "residual_multiplier", 1.0)
        default = attention.head_dim**-0.5
        assert attention.scale == getattr(config, "attention_multiplier", default)
        assert attention.head_dim == (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        limited = ("sliding_attention", "chunked_attention")
        window = getattr(config, "sliding_window", getattr(config, "attention_chunk_size", None))
        kinds = getattr(config, "layer_types", ["sliding_attention"] * spec.layers)
        slides = any(kind in limited for kind in kinds)
        assert attention.sliding_window == (window if slides else None)
        assert [attention.window(layer) for layer in range(spec.layers)] == [
            window if kind in limited else None for kind in kinds
        ]
        assert attention.chunked == hasattr(config, "attention_chunk_size")
        rotates = getattr(config, "no_rope_layers", [1] * spec.layers)
        assert [layer not in attention.unrotated_layers for layer in range(spec.layers)] == rotates
        tuned = getattr(config, "attn_temperature_tuning", False)
        assert attention.temperature == (
            TemperatureTuning(config.attn_scale, config.floor_scale) if tuned else None
        )
        assert attention.qkv_clip == getattr(config, "clip_qkv", None)
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        assert attention.rope.dim == int(attention.head_dim * share)
        per_head = config.model_type.startswith(("qwen3", "hunyuan"))
        per_head = getattr(config, "use_qk_norm", per_head)
        assert attention.qk_norm.endswith("head") == per_head
    for ffn in spec.ffn:
        if isinstance(ffn, DenseFFN):
            size = getattr(config, "intermediate_size_mlp", config.intermediate_size)
            assert ffn.intermediate == size
            continue
        shared_size = getattr(config, "shared_expert_intermediate_size", None)
        router = ffn.router
        v2 = config.model_type == "deepseek_v2"
        experts = "n_routed_experts" if v2 else "num_local_experts"
        assert ffn.experts == getattr(config, experts, getattr(config, "num_experts", None))
        size = getattr(config, "intermediate_size", None)
        assert ffn.intermediate == getattr(config, "moe_intermediate_size", size)
        shared = getattr(config, "n_shared_experts", 0) or 0
        shared = getattr(config, "moe_num_shared_experts", shared)
        llama4 = config.model_type == "llama4_text"
        if llama4 or config.model_type == "hunyuan_v1_moe":
            shared = 1
        assert ffn.weighs_input == llama4
        assert ffn.shared_intermediate == (shared_size or shared * ffn.intermediate)
        assert ffn.shared_gate == (shared_size is not None)
        assert router.top_k == config.num_experts_per_tok
        factor = getattr(config, "residual_multiplier", 1.0)
        assert router.scale == getattr(config, "routed_scaling_factor", factor)
        assert router.renormalize == getattr(
            config, "norm_topk_prob", not (mixes_sparsely or llama4)
        )
        assert (router.score == "sparsemixer") == mixes_sparsely
        assert router.jitter == getattr(config, "router_jitter_noise", 0.0) * mixes_sparsely
        assert router.groups == (getattr(config, "n_group", 1) or 1)
        assert router.top_groups == (getattr(config, "topk_group", 1) or 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_take_transformers_defaults(family: str, tmp_path: Path) -> None:
    spec = read_model(_write(tmp_path, family))
    _check_against(spec, AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_small_configs_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    path = make_random_checkpoint(family, tmp_path / "c")
    spec = read_model(path)
    _check_against(spec, AutoConfig.from_pretrained(path))
    assert spec.dtype == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_those_of_a_published_checkpoint(
    family: str, tied: bool, tmp_path: Path
) -> None:
    path = make_random_checkpoint(family, tmp_path / "c", {"tie_word_embeddings": tied})
    spec = read_model(path)
    config = AutoConfig.from_pretrained(path)
    expected = {name: tuple(t.shape) for name, t in hub_tensors(config, config.dtype).items()}
    refs = [ref for _, ref in attention_tensors(spec)]
    refs += [ref for layer in range(spec.layers) for ref in ffn_tensors(spec, layer)]
    stored = {ref.name: ref.stack.floats(ref.shape) if ref.stack else ref.shape for ref in refs}
    parts = [part for ref in refs if ref.joined for part in ref.joined.parts]
    stored |= {part.name: (part.height, spec.hidden) for part in parts}
    assert stored == expected
    assert len({(ref.name, ref.stack) for ref in refs}) == len(refs)


def test_kv_width_and_bytes() -> None:
    gqa = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25}
    rope = {"dim": 16, "interleaved": False}
    spec = ModelSpec(
        family="mixtral",
        hidden=64,
        vocab=10,
        context=8,
        dtype="bfloat16",
        norm_eps=1e-5,
        tied_embeddings=False,
        attention=GQASpec(**gqa, rope=RopeSpec(**rope)),
        ffn=(DenseFFN(intermediate=8),) * 3,
        eos_token_ids=(),
    )
    assert spec.kv_width == 2 * 2 * 16
    assert (spec.kv_dtype, spec.kv_bytes_per_token) == ("bfloat16", 3 * 64 * 2)
    rounded = replace(spec, kv_cache_dtype="fp8_e5m2")
    assert (rounded.kv_dtype, rounded.kv_bytes_per_token) == ("fp8_e5m2", 3 * 64)


def test_qwen3_dense_layers(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    spec = read_model(_write(tmp_path, "qwen3_moe", **fields))
    kinds = [isinstance(ffn, MoEFFN) for ffn in spec.ffn]
    assert kinds == [False, True, False, False, False, True]


def test_deepseek_v3_yarn_sharpens_the_softmax(tmp_path: Path) -> None:
    scaling = {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    }
    path = _write(tmp_path, "deepseek_v3", rope_scaling=scaling, max_position_embeddings=163840)
    # DeepSeek-V3's published value: 192 ** -0.5 * (0.1 * ln 40 + 1) ** 2
    assert read_model(path).attention.scale == pytest.approx(0.1352337788608801)


def test_gpt_oss_as_published(tmp_path: Path) -> None:
    """The fields of openai/gpt-oss-20b's config.json that transformers does not write itself."""
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    fields = {
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "experts_per_token": 4,
        "initial_context_length": 4096,
        "swiglu_limit": 7.0,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "eos_token_id": 200002,
        "quantization_config": {
            "modules_to_not_convert": [*plain, "lm_head"],
            "quant_method": "mxfp4",
        },
    }
    spec = read_model(_write(tmp_path, "gpt_oss", **fields))
    _check_against(spec, AutoConfig.from_pretrained(tmp_path))
    moe = spec.ffn[0]
    assert isinstance(moe, MoEFFN) and spec.ffn == (moe,) * 24
    assert (moe.swiglu_limit, moe.biases, moe.router.logit_bias) == (7.0, True, True)
    assert isinstance(spec.attention, GQASpec) and spec.attention.sinks
    refs = [ref for _, ref in attention_tensors(spec)] + ffn_tensors(spec, 3)
    held = {ref.name for ref in refs if ref.scheme == MXFP4()}
    assert held == {f"model.layers.3.mlp.experts.{n}_proj" for n in ("gate_up", "down")}


def test_phi_as_published(tmp_path: Path) -> None:
    """The fields of microsoft/Phi-3.5-MoE-instruct's config.json, but for values of its factors."""
    fields = {
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "lm_head_bias": True,
        "hidden_size": 64,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 131072,
        "rope_theta": 10000.0,
        "rope_scaling": longrope(4096) | {"type": "longrope"},
        "torch_dtype": "bfloat16",
    }
    fields["rope_scaling"] = {
        name: value
        for name, value in fields["rope_scaling"].items()
        if name not in ("rope_type", "rope_theta")
    }
    path = _write(tmp_path, "phimoe", **fields)
    spec = read_model(path)
    _check_against(spec, AutoConfig.from_pretrained(path))
    for context, length in ((4096, "short"), (4097, "long")):
        spec = read_model(path, context_length=context)
        found, factor = frequencies(spec, path)
        wanted = torch.tensor(fields["rope_scaling"][f"{length}_factor"])
        assert factor == fields["rope_scaling"][f"{length}_mscale"]
        torch.testing.assert_close(found * wanted, unscaled_frequencies(10000.0, 16))


def test_llama4_as_published(tmp_path: Path) -> None:
    """The shape of meta-llama/Llama-4-Scout-17B-16E's config.json, with less layers and vocabulary:
    that of a multimodal model."""
    text = {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": 8,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "max_position_embeddings": 10485760,
        "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0],
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "eos_token_id": 200001,
        "vocab_size": 1000,
    }
    fields = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields | {"torch_dtype": "bfloat16"}))
    spec = read_model(tmp_path)
    _check_against(spec, AutoConfig.from_pretrained(tmp_path).text_config)
    assert spec.attention.rope == RopeSpec(dim=128, interleaved=True, fp32=True)
    names = [ref.name for _, ref in attention_tensors(spec)] + [
        ref.name for ref in ffn_tensors(spec, 0)
    ]
    assert all(name.startswith("language_model.") for name in names)
    assert "language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight" in names
    text["attn_temperature_tuning"] = 4  # as first published
    file.write_text(json.dumps(fields | {"torch_dtype": "bfloat16"}))
    assert read_model(tmp_path) == spec


def test_qwen3_5_as_published(tmp_path: Path) -> None:
    """A multimodal model names its language model's tensors otherwise, but for the LM head."""
    config = CONFIG_MAPPING["qwen3_5_moe"]()
    text = {"num_hidden_layers": 8, "eos_token_id": 248044}
    file = tmp_path / "config.json"
    fields = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": config.text_config.to_dict() | text | {"layer_types": None},
        "dtype": "bfloat16",
    }
    file.write_text(json.dumps(config.to_dict() | fields))
    spec = read_model(tmp_path)
    _check_against(spec, AutoConfig.from_pretrained(tmp_path).text_config)
    refs = {(layer, ref.key): ref for layer, ref in attention_tensors(spec)}
    joined = refs[0, "qkvz_proj"].joined
    assert joined is not None
    block = "model.language_model.layers.0.linear_attn"
    assert {part.name for part in joined.parts} == {
        f"{block}.in_proj_qkv.weight",
        f"{block}.in_proj_z.weight",
    }
    assert refs[0, "decay"].name == f"{block}.A_log"
    assert refs[None, "lm_head"].name == "lm_head.weight"
    experts = {ref.name: ref for ref in ffn_tensors(spec, 0) if ref.expert == 3}
    block = "model.language_model.layers.0.mlp.experts"
    assert set(experts) == {f"{block}.gate_up_proj", f"{block}.down_proj"}


def test_minimax_says_how_much_of_a_head_rotates(tmp_path: Path) -> None:
    """Published configs have ``rotary_dim``, those of transformers ``partial_rotary_factor``."""
    published = read_model(_write(tmp_path, "minimax_m2", head_dim=128, rotary_dim=64))
    other = read_model(_write(tmp_path, "minimax_m2", head_dim=128, partial_rotary_factor=0.5))
    assert published == other
    assert published.attention.rope.dim == 64


def test_hunyuan_lists_numbers_by_layer(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 2, "intermediate_size": 48, "num_experts": 4}
    lists = {"moe_topk": [2, 2], "moe_intermediate_size": [48, 48], "num_shared_expert": [1, 1]}
    listed = read_model(_write(tmp_path, "hunyuan_v1_moe", **fields, **lists))
    assert listed == read_model(_write(tmp_path, "hunyuan_v1_moe", **fields, moe_topk=2))
    assert isinstance(listed.ffn[0], MoEFFN)
    assert (listed.ffn[0].router.top_k, listed.ffn[0].shared_intermediate) == (2, 48)


def test_experts_of_a_common_tensor_are_not_rounded(tmp_path: Path) -> None:
    path = _write(tmp_path, "granitemoe")
    with pytest.raises(ConfigError, match=r"input_linear\.weight: it holds all experts of a layer"):
        read_model(path, rounded="int8")


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    path = _write(tmp_path, "qwen3_moe", eos_token_id=7)
    (path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert read_model(path).eos_token_ids == (7, 9)


def test_context_length_and_dtype_given_by_the_user(tmp_path: Path) -> None:
    path = _write(tmp_path, "olmoe")
    spec = read_model(path, context_length=100, dtype="float32")
    assert (spec.context, spec.dtype) == (100, "float32")
    with pytest.raises(ConfigError, match="max_position_embeddings=4096"):
        read_model(path, context_length=4097)
    with pytest.raises(ConfigError, match="float16"):
        read_model(path, dtype="float16")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mixtral", {"hidden_size": 0}, "hidden_size=0: must be an integer of at least 1"),
        ("mixtral", {"hidden_size": "64"}, "hidden_size"),
        ("mixtral", {"num_key_value_heads": 5}, "num_key_value_heads=5: must divide"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9: must be at most 8"),
        ("mixtral", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("mixtral", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("mixtral", {"head_dim": 7}, "head_dim"),
        ("mixtral", {"sliding_window": -1}, "sliding_window"),
        ("mixtral", {"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu': must be silu"),
        (
            "mixtral",
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config.quant_method='bitsandbytes': supported are awq,",
        ),
        ("mixtral", {"dtype": "float8"}, "dtype='float8'"),
        ("mixtral", {"eos_token_id": "x"}, "eos_token_id"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
        ("mixtral", {"rope_scaling": {"type": "longrope"}}, "rope_type must be one of"),
        ("mixtral", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor=None"),
        ("mixtral", {"rope_scaling": [1]}, "rope_scaling"),
        ("mixtral", {"rope_theta": -1.0}, "rope_theta"),
        ("mixtral", {"rope_parameters": {"full": {"rope_theta": 1}}}, "rope_parameters"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("olmoe", {"head_dim": 16}, "head_dim=16"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("qwen3_moe", {"num_key_value_heads": None}, "num_key_value_heads"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok=None"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group=None"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek_v3", {"n_group": 7}, "n_group=7: must divide"),
        ("deepseek_v3", {"n_group": 256, "topk_group": 8}, "n_group=256: every group"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group=9: must be at most n_group=8"),
        ("deepseek_v3", {"qk_rope_head_dim": 3}, "qk_rope_head_dim"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types=['full_attention']: must"),
        ("gpt_oss", {"layer_types": ["linear_attention"] * 36}, "for 36 layers"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit=0: must be a number above 0"),
        ("gpt_oss", {"rope_theta": 1e4}, "rope_theta=10000.0: must come with rope_scaling"),
        ("gpt_oss", {"head_dim": 33}, "head_dim=33: heads of 33 features cannot rotate"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "fp8"}},
            "fp8 cannot hold model.layers.0.mlp.experts.gate_up_proj: it holds all experts",
        ),
        (
            "qwen3_5_moe_text",
            {"quantization_config": {"quant_method": "fp8"}},
            "fp8 cannot hold model.layers.0.linear_attn.in_proj_qkv.weight: its rows lie in",
        ),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True: must be false"),
        ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention']"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}, "for 48 layers"),
        ("qwen3_next", {"full_attention_interval": 99}, "must have full_attention in some layer"),
        ("qwen3_next", {"linear_num_value_heads": 24}, "must be a multiple of 16 key heads"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim=1: must be an"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True: must be false"),
        ("llama", {"rope_scaling": {"type": "dynamic", "alpha": 2.0}}, "rope_type must be one of"),
        ("minimax_m2", {"rotary_dim": 130}, "rotary_dim=130: must be even and at most"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func='softmax': must be sigmoid"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list=[1, 0]: must be 1"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias=False: must be true"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True: must be false"),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min=0.1: must be at most 1e-06"),
        ("ernie4_5_moe", {"moe_k": 65}, "moe_k=65: must be at most moe_num_experts=64"),
        ("granitemoe", {"embedding_multiplier": 0}, "embedding_multiplier=0: must be a number"),
        ("granitemoe", {"logits_scaling": "8"}, "logits_scaling='8': must be a number above 0"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla=True: must be false"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "moe_topk=[1, 2]: must be the same for every"),
        ("hunyuan_v1_moe", {"moe_topk": 2}, "moe_topk=2: must be at most num_experts=1"),
        ("hunyuan_v1_moe", {"num_shared_expert": [2, 2]}, "num_shared_expert=[2, 2]: must be 1"),
        ("hunyuan_v1_moe", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.alpha=None"),
        (
            "phimoe",
            {"num_experts_per_tok": 1},
            "num_experts_per_tok=1: must be 2, which sparsemixer",
        ),
        (
            "phimoe",
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            "must be one of default, longrope",
        ),
        ("phimoe", {"rope_scaling": longrope(0)}, "original_max_position_embeddings=0"),
        ("phimoe", {"rope_scaling": longrope(9)}, "short_factor must list 64 numbers, one for"),
        ("phimoe", {"router_jitter_noise": -1}, "router_jitter_noise=-1: must be a number above 0"),
        (
            "llama4_text",
            {"no_rope_layers": [1]},
            "no_rope_layers=[1]: must list 0 or 1 for each of 48",
        ),
        ("llama4_text", {"layer_types": ["full"] * 48}, "must list chunked_attention or full_att"),
        (
            "llama4_text",
            {"attn_temperature_tuning": "x"},
            "attn_temperature_tuning='x': must be true",
        ),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
        ("glm4_moe", {"partial_rotary_factor": True}, "partial_rotary_factor=True"),
        ("glm4_moe", {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.01}}, "0.01"),
        ("glm4_moe", {"use_qk_norm": 1}, "use_qk_norm=1: must be true or false"),
    ],
)
def test_nonsense_is_named(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model(_write(tmp_path, family, **fields))
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
        {"architectures": ["MixtralForSequenceClassification"]},
        {"architectures": None, "model_type": "mamba"},
        {"architectures": "MixtralForCausalLM"},
    ],
)
def test_unsupported_architectures_name_the_supported(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model(_write(tmp_path, "mixtral", **fields))
    for architecture in ARCHITECTURES.values():
        assert architecture in str(caught.value)


def test_model_type_decides_where_no_architecture_is_named(tmp_path: Path) -> None:
    assert read_model(_write(tmp_path, "mixtral", architectures=None)).family == "mixtral"


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        read_model(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "JSON object"), ("\xff", "JSON")):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=message):
            read_model(tmp_path)


def test_reading_a_model_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, crosspool.models.registry, crosspool.weightpool.placement;"
        "print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
