"""Which modules are quantised, and how, by the fields of a config.json; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crosspool.config.errors import ConfigError
from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.schemes import AWQ, GPTQ, MXFP4, Elements, PackedWords, Scheme
from crosspool.models.spec import ModelSpec
from make_random_checkpoint import make_random_checkpoint
from transformers.quantizers.quantizers_utils import should_convert_module

GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def _compressed(format_: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _read(tmp_path: Path, quantization: object, **fields: Any) -> ModelSpec:
    path = tmp_path / "checkpoint"
    if not path.exists():
        make_random_checkpoint("qwen3_moe", path, {"mlp_only_layers": [1]})
    file = path / "config.json"
    values = json.loads(file.read_text()) | {"quantization_config": quantization} | fields
    file.write_text(json.dumps(values))
    return read_model(path)


def _schemes(spec: ModelSpec) -> dict[str, Scheme | None]:
    refs = [ref for _, ref in attention_tensors(spec)]
    refs += [ref for layer in range(spec.layers) for ref in ffn_tensors(spec, layer)]
    return {ref.module: ref.scheme for ref in refs}


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (
            FP8,
            Elements(values="fp8", block=(128, 128), scales=("weight_scale_inv", "weight_scale")),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            Elements(values="fp8", block=(None, None), scales=("weight_scale", "weight_scale_inv")),
        ),
        (GPTQ4, GPTQ(bits=4, block=(1, 32))),
        (
            GPTQ4 | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2", "desc_act": True},
            GPTQ(bits=8, block=(1, None), act_order=True, zeros_less_one=False),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
            AWQ(bits=4, block=(1, 32)),
        ),
        (
            _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
            PackedWords(bits=4, block=(1, 32)),
        ),
        (
            _compressed(
                "pack-quantized", num_bits=4, group_size=32, symmetric=False, actorder="group"
            ),
            PackedWords(bits=4, block=(1, 32), symmetric=False, act_order=True),
        ),
        (
            _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
            Elements(values="int8", block=(1, None)),
        ),
        (
            _compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
            Elements(values="fp8", block=(None, None)),
        ),
        (
            _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
            Elements(values="fp8", block=(1, None)),
        ),
        (
            _compressed(
                "float-quantized",
                num_bits=8,
                type="float",
                strategy="block",
                block_structure=[128, 128],
            ),
            Elements(values="fp8", block=(128, 128)),
        ),
        (
            _compressed(
                "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32
            ),
            MXFP4(),
        ),
    ],
)
def test_schemes(config: dict[str, Any], scheme: Scheme, tmp_path: Path) -> None:
    """Projections and experts have the scheme; embeddings, routers, norms and LM head none."""
    found = _schemes(_read(tmp_path, config))
    quantized = {module for module, one in found.items() if one is not None}
    assert all(found[module] == scheme for module in quantized)
    assert quantized == {module for module in found if module.endswith("_proj")}


def test_left_out_as_transformers_leaves_out(tmp_path: Path) -> None:
    plain = ["lm_head", "model.layers.0.mlp.gate", "o_proj", "model.layers.1", "model.*.k_proj"]
    found = _schemes(_read(tmp_path, FP8 | {"modules_to_not_convert": plain}))
    for module, scheme in found.items():
        if module.endswith("_proj"):
            assert (scheme is not None) == should_convert_module(module, plain), module
    assert found["model.layers.0.self_attn.q_proj"] is not None
    assert found["model.layers.0.self_attn.o_proj"] is None


def test_left_out_by_the_rules_of_the_other_tools(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", "group_size": 32, "modules_to_not_convert": ["gate", "self_attn"]}
    found = _schemes(_read(tmp_path, awq))
    assert found["model.layers.0.self_attn.q_proj"] is None
    assert found["model.layers.1.mlp.gate_proj"] is not None

    rules = {
        r"-:.*\.o_proj": {},
        r"+:.*\.experts\.": {"bits": 8, "group_size": -1},
        r"model\.layers\.1\.mlp": {"desc_act": True},
    }
    found = _schemes(_read(tmp_path, GPTQ4 | {"dynamic": rules}))
    assert found["model.layers.0.self_attn.o_proj"] is None
    assert found["model.layers.0.mlp.experts.1.up_proj"] == GPTQ(bits=8, block=(1, None))
    assert found["model.layers.1.mlp.up_proj"] == GPTQ(bits=4, block=(1, 32), act_order=True)
    assert found["model.layers.1.self_attn.q_proj"] == GPTQ(bits=4, block=(1, 32))
    inside = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.experts.0.up_proj"]]
    found = _schemes(_read(tmp_path, GPTQ4 | {"modules_in_block_to_quantize": inside}))
    assert {module.split(".", 3)[3] for module, scheme in found.items() if scheme} == {
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.experts.0.up_proj",
    }
    assert _schemes(_read(tmp_path, GPTQ4 | {"lm_head": True}))["lm_head"] is not None

    mixed = _compressed("pack-quantized", num_bits=4, group_size=32)
    mixed["ignore"] = ["re:.*self_attn.*", "model.layers.1.mlp.up_proj"]
    experts = {
        "targets": ["re:.*experts.*"],
        "format": "int-quantized",
        "weights": {"num_bits": 8, "strategy": "channel"},
    }
    mixed["config_groups"] = {"experts": experts} | mixed["config_groups"]
    found = _schemes(_read(tmp_path, mixed))
    assert found["model.layers.0.self_attn.q_proj"] is None
    assert found["model.layers.1.mlp.up_proj"] is None
    assert found["model.layers.1.mlp.down_proj"] == PackedWords(bits=4, block=(1, 32))
    expected = Elements(values="int8", block=(1, None))
    assert found["model.layers.0.mlp.experts.3.down_proj"] == expected
    assert found["lm_head"] == PackedWords(bits=4, block=(1, 32))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1], "quantization_config=[1]: must be an object"),
        ({"bits": 4}, "quantization_config.quant_method=None: supported are awq, compressed-"),
        (GPTQ4 | {"bits": 3}, "quantization_config.bits=3: supported are 4 and 8"),
        (GPTQ4 | {"group_size": 0}, "quantization_config.group_size=0: must be at least 1, or -1"),
        (GPTQ4 | {"group_size": 48}, "gptq cannot hold model.layers.0.self_attn.q_proj.weight: "),
        (GPTQ4 | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin': supported are gptq"),
        (GPTQ4 | {"dynamic": {"(": {}}}, "dynamic={'(': {}}: holds a broken regular expression"),
        (GPTQ4 | {"dynamic": {"x": {"act": 1}}}, "dynamic.x.act=1: supported are bits, group_size"),
        ({"quant_method": "awq", "bits": 8}, "quantization_config.bits=8: supported are 4"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv': supported is gemm"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size=[128]: must be two integers"),
        (FP8 | {"modules_to_not_convert": "x"}, "modules_to_not_convert='x': must be a list"),
        (
            _compressed("pack-quantized", num_bits=3, group_size=32),
            "quantization_config.config_groups.group_0.weights.num_bits=3: supported are 4 and 8",
        ),
        (
            _compressed("nvfp4-pack-quantized", num_bits=4, type="float"),
            "quantization_config.format='nvfp4-pack-quantized': supported are float-quantized,",
        ),
        (
            _compressed("int-quantized", num_bits=8, strategy="token"),
            "weights.strategy='token': must be tensor, channel, group or block",
        ),
        (
            _compressed("int-quantized", num_bits=8) | {"sparsity_config": {"format": "x"}},
            "sparsity_config={'format': 'x'}: sparse and transformed weights are not supported",
        ),
    ],
)
def test_what_is_refused_is_named(config: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _read(tmp_path, config)
    assert said in str(error.value)
    assert "config.json" in str(error.value)


def test_float16_is_computed_in_bfloat16(tmp_path: Path) -> None:
    assert _read(tmp_path, None, dtype="float16").dtype == "bfloat16"
