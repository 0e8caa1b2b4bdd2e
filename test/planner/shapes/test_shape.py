"""Compares shapes with published totals and with transformers, and refuses nonsense in a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crosspool
import pytest
import torch
from crosspool.config.errors import ConfigError
from crosspool.models.registry import read_model
from crosspool.planner.shapes import catalogue
from crosspool.planner.shapes.held import held_shape
from crosspool.planner.shapes.reader import shape_of_config
from crosspool.planner.shapes.shape import ModelShape
from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes
from make_random_checkpoint import make_random_checkpoint
from support.families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

DEMO = Path(crosspool.__file__).parent / "demo"
FACTS = Path(__file__).parents[4] / "shared" / "reference" / "model_facts.json"
FOLDER = Path(catalogue.__file__).parent
WHOLE = FFNShard(rank=0, ranks=1, parallel="tp")
DENSE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
MOE = DENSE | {"model_type": "unheard_of", "num_local_experts": 4, "num_experts_per_tok": 2}


def _read(folder: Path, fields: dict[str, Any]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(fields))
    return shape_of_config(folder)


def _transformers_parameters(fields: dict[str, Any]) -> int:
    """Counts the parameters of transformers' own model and its routers' buffers, without memory."""
    fields = {key: value for key, value in fields.items() if key != "crosspool"}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    buffers = (tensor for name, tensor in model.named_buffers() if "correction_bias" in name)
    return sum(t.numel() for t in model.parameters()) + sum(t.numel() for t in buffers)


@pytest.mark.parametrize("name", catalogue.names())
def test_parameters_are_those_of_the_published_total(name: str) -> None:
    published = catalogue.origin(name).parameters
    billions = published.removesuffix("B")
    unit = 10 ** -len(billions.partition(".")[2])
    # Rounded or, as GLM-4.5-Air's 106.85, cut off after the last published digit.
    difference = catalogue.load(name).parameters / 1e9 - float(billions)
    assert -unit / 2 <= difference < unit, f"{name} is published to have {published}"


@pytest.mark.parametrize("name", catalogue.names())
def test_parameters_are_those_of_transformers(name: str) -> None:
    fields = json.loads((FOLDER / f"{name}.json").read_text())
    assert catalogue.load(name).parameters == _transformers_parameters(fields)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("DeepSeek-V2-Lite", 95.0),
        ("Qwen3-30B-A3B", 95.0),
        ("GLM-4.7-Flash", 94.5),
        ("Llama-30B", 66.0),
        ("Qwen3-32B", 76.8),
    ],
)
def test_ffn_shares_of_the_paper(name: str, share: float) -> None:
    assert catalogue.load(name).ffn_share * 100 == pytest.approx(share, abs=0.1)


def _active_parameters(shape: ModelShape) -> float:
    """Counts the parameters that one token reads, among them its own row of the embedding."""
    looked_up = 0 if shape.tied_embeddings else (shape.vocab - 1) * shape.hidden
    ffn = shape.active_ffn_bytes_per_token / shape.dtype_bytes
    return shape.attention_parameters - looked_up + ffn


@pytest.mark.parametrize(
    ("name", "active"),
    [("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13), ("DeepSeek-V2-Lite", 2.4)],
)
def test_active_parameters_are_the_published(name: str, active: float) -> None:
    assert _active_parameters(catalogue.load(name)) / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.skipif(not FACTS.exists(), reason="no table of model facts beside the repository")
def test_catalogue_agrees_with_the_table_of_facts() -> None:
    facts = json.loads(FACTS.read_text())["models"]
    assert {fact["id"] for fact in facts} <= set(catalogue.names())
    for fact in facts:
        shape = catalogue.load(fact["id"])
        same = {"experts", "top_k", "layers", "hidden", "attention", "q_heads", "vocab", "context"}
        same |= {"moe_intermediate", "shared_intermediate", "dense_layers", "kv_lora_rank"}
        same |= {"dense_intermediate", "q_lora_rank", "qk_rope_head_dim", "v_head_dim"}
        for field in same & set(fact):
            assert getattr(shape, field) == fact[field], (shape.id, field)
        kib = shape.kv_bytes_per_token / 1024
        assert kib == pytest.approx(fact["kv_kib_per_token"], abs=0.05), shape.id
        assert shape.ffn_bytes / 1e9 == pytest.approx(fact["ffn_gb"], rel=2e-3), shape.id
        attention = (shape.attention_bytes - shape.embedding_bytes) / 1e9
        assert attention == pytest.approx(fact["attn_gb"], abs=0.05), shape.id


@pytest.mark.parametrize("folder", sorted(DEMO.glob("tiny-*")), ids=lambda folder: folder.name)
def test_bundled_models_are_counted_as_the_pools_count_them(folder: Path) -> None:
    shape, spec = shape_of_config(folder), read_model(folder)
    assert shape.id == folder.name
    assert shape.ffn_bytes == ffn_bytes(spec, WHOLE)
    assert shape.attention_bytes == attention_bytes(spec)
    assert shape.kv_bytes_per_token == spec.kv_bytes_per_token
    assert (shape.context, shape.layers) == (spec.context, spec.layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_counted_as_the_pools_count_them(
    family: str, dtype: str, tmp_path: Path
) -> None:
    fields = {"tie_word_embeddings": True}
    if family not in ("mixtral", "qwen2_moe", "minimax_m2", "ernie4_5_moe"):
        fields["attention_bias"] = True
    path = make_random_checkpoint(family, tmp_path / "c", fields, dtype=dtype)
    shape, spec = shape_of_config(path), read_model(path)
    assert shape.ffn_bytes == ffn_bytes(spec, WHOLE)
    assert shape.attention_bytes == attention_bytes(spec)
    assert shape.kv_bytes_per_token == spec.kv_bytes_per_token
    assert (shape.state_bytes, shape.state_row) == (spec.state_bytes, spec.state_row)


def test_recurrent_state_of_a_published_model() -> None:
    """Qwen3-Next-80B-A3B: 36 layers of 32 matrices [128, 128] and 3 inputs of 8192 features, all in
    float32, and KV in the 12 others."""
    shape = catalogue.load("Qwen3-Next-80B-A3B")
    assert shape.state_bytes == 36 * (32 * 128 * 128 + 3 * 8192) * 4
    assert shape.kv_bytes_per_token == 12 * 2 * 2 * 256 * 2


def test_codes_are_counted_as_the_pools_count_them(tmp_path: Path) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path = make_random_checkpoint("qwen3_moe", tmp_path / "c", {}, dtype="bfloat16")
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": gptq}))
    floats, spec = shape_of_config(path), read_model(path)
    shape = held_shape(floats, file, None)
    assert shape.ffn_bytes == ffn_bytes(spec, WHOLE, codes=True) < floats.ffn_bytes / 2
    assert shape.attention_bytes == attention_bytes(spec, codes=True) < floats.attention_bytes
    share = shape.active_ffn_bytes_per_token / floats.active_ffn_bytes_per_token
    assert share == pytest.approx(shape.ffn_bytes / floats.ffn_bytes, rel=1e-3)
    assert shape.parameters == floats.parameters


@pytest.mark.parametrize(
    ("format_", "bits"), [("int4", 4.25), ("int8", 8), ("mxfp4", 4.5), ("Q4_K", 5), ("Q6_K", 7)]
)
def test_a_model_of_the_catalogue_is_counted_in_a_format(format_: str, bits: float) -> None:
    floats = catalogue.load("Qwen3-30B-A3B")
    shape = held_shape(floats, catalogue.file_of("Qwen3-30B-A3B"), format_)
    assert 16 * shape.ffn_bytes / floats.ffn_bytes == pytest.approx(bits, rel=0.01)
    assert shape.attention_bytes > floats.embedding_bytes


def test_gpt_oss_in_the_format_in_which_it_is_published() -> None:
    """Experts alone are codes, of 4.5 bits with their scales of 16 bits for each 32."""
    for name, layers, experts in (("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)):
        shape = catalogue.load(name)
        held = held_shape(shape, catalogue.file_of(name), None)
        weights = layers * experts * 3 * 2880 * 2880
        assert held.ffn_bytes == pytest.approx(weights * 4.5 / 8, rel=0.003)
        assert held.attention_bytes == shape.attention_bytes


def test_a_family_that_is_not_served_has_no_codes(tmp_path: Path) -> None:
    shape, file = _read(tmp_path, MOE), tmp_path / "config.json"
    assert held_shape(shape, file, None) == shape
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: how its weights are held in int4"):
        held_shape(shape, file, "int4")


def test_a_served_family_has_a_shape_in_any_dtype_and_quantisation(tmp_path: Path) -> None:
    fields = MOE | {"model_type": "mixtral", "num_key_value_heads": 2}
    plain = _read(tmp_path, fields)
    quantised = {"quantization_config": {"quant_method": "gptq"}, "dtype": "float16"}
    assert _read(tmp_path, fields | quantised) == plain
    assert _read(tmp_path, fields | {"dtype": "float32"}).ffn_bytes == 2 * plain.ffn_bytes
    with pytest.raises(ConfigError, match="rope_type must be one of"):
        _read(tmp_path, fields | {"rope_scaling": {"type": "longrope"}})


@pytest.mark.parametrize(
    "fields",
    [
        DENSE
        | {"model_type": "granite", "attention_bias": True, "mlp_bias": True}
        | {"num_key_value_heads": 1},
        DENSE | {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
        MOE | {"model_type": "glm4_moe", "use_qk_norm": True, "first_k_dense_replace": 1}
        | {"n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 16}
        | {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "n_group": 1},
        MOE | {"model_type": "qwen2_moe", "num_experts": 4, "decoder_sparse_step": 2}
        | {"shared_expert_intermediate_size": 48, "moe_intermediate_size": 24}
        | {"num_key_value_heads": 4},
    ],
    ids=["mqa-biases", "tied", "glm4-moe", "qwen2-moe"],
)  # fmt: skip
def test_small_models_have_the_parameters_of_transformers(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    assert _read(tmp_path, fields).parameters == _transformers_parameters(fields)


def test_attention_kinds_and_window(tmp_path: Path) -> None:
    kinds = {name: catalogue.load(name).attention for name in catalogue.names()}
    assert kinds["Llama-30B"] == kinds["OLMoE-1B-7B"] == "mha"
    assert kinds["Mixtral-8x7B"] == "gqa"
    assert kinds["DeepSeek-V3"] == "mla"
    assert _read(tmp_path, DENSE | {"num_key_value_heads": 1}).attention == "mqa"
    oss = catalogue.load("gpt-oss-20b")
    assert (oss.sliding_window, oss.sliding_layers) == (128, 12)
    assert oss.kv_bytes_per_token == 24 * 2 * 8 * 64 * 2
    for name in ("Qwen1.5-MoE-A2.7B", "Phi-3.5-MoE"):  # not used; as long as the context
        assert catalogue.load(name).sliding_layers == 0
    alternating = MOE | {"model_type": "gpt_oss", "num_hidden_layers": 5, "sliding_window": 16}
    alternating["num_key_value_heads"] = 2
    assert _read(tmp_path, alternating).sliding_layers == 3


def test_other_spellings(tmp_path: Path) -> None:
    names = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}
    names |= {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
    respelt = {names.get(field, field): value for field, value in DENSE.items()}
    assert _read(tmp_path, respelt | {"model_type": "unheard_of"}) == _read(tmp_path, DENSE)


def test_names_of_the_catalogue() -> None:
    shape = catalogue.load("qwen3-30b-a3b")
    assert shape.id == "Qwen3-30B-A3B"
    assert catalogue.load("Qwen/Qwen3-30B-A3B") == catalogue.find("QWEN3-30B-A3B") == shape
    assert catalogue.find(str(DEMO / "tiny-qwen3-moe")).experts == 8
    with pytest.raises(ConfigError, match="closest names are Qwen3-30B-A3B"):
        catalogue.load("Qwen3-30B-A3")
    with pytest.raises(ConfigError, match="the catalogue has DeepSeek-V2-Lite, "):
        catalogue.find("zzzz")
    with pytest.raises(ConfigError, match=r"nowhere/config\.json is missing"):
        catalogue.find("nowhere/config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "hidden_size=None: must be an integer"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings=1.5"),
        ({"num_attention_heads": 3}, "num_attention_heads=3: must divide the hidden size 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide the 4 query heads"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: must be at most 4"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok=None"),
        ({"intermediate_size": None}, "intermediate_size=None"),
        ({"dtype": "int4"}, "dtype='int4': must be bfloat16, float16, float32"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "holds 'linear_attention'"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ({"kv_lora_rank": 8}, "qk_rope_head_dim=None"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True: must be a decoder"),
    ],
)
def test_nonsense_names_file_and_field(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, MOE | fields)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
