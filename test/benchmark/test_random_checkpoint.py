"""The benchmarks' checkpoint, as transformers reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from crosspool.models.registry import read_model
from crosspool.planner.shapes import catalogue
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark import checkpoint, expert_rules, int4_checkpoint, large


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoint.write(path, checkpoint.TINY)
    return path


def test_transformers_loads_every_tensor_and_its_logits_spread(folder: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.inference_mode():
        output = model(torch.arange(3, 203)[None], output_hidden_states=True)
    logits = output.logits.float()
    assert logits.shape == (1, 200, checkpoint.TINY.vocabulary)
    assert 1.0 < logits.std() < 4.0
    # the residual neither dies out nor blows up
    last = output.hidden_states[-2].float().std()
    assert 0.7 < last < 3.0
    # greedy tokens depend on what came before
    assert len(set(logits[0].argmax(-1).tolist())) > 50


def test_the_same_seed_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "same", checkpoint.TINY)
    checkpoint.write(tmp_path / "other", checkpoint.TINY, seed=1)
    name = "model-00001-of-00003.safetensors"
    key = "model.layers.0.mlp.experts.7.up_proj.weight"
    first, same, other = (
        load_file(path / name)[key] for path in (folder, tmp_path / "same", tmp_path / "other")
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_tokenizer_returns_every_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "plain, naïve, 漢字 and <s>"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < checkpoint.TINY.vocabulary
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == checkpoint.TINY.vocabulary


def test_the_engine_reads_it(folder: Path) -> None:
    spec = read_model(folder)
    assert (spec.hidden, spec.layers, spec.context) == (256, 2, 8192)


def test_models_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSPOOL_BENCH_DIR", str(tmp_path))
    folders = checkpoint.models(2, tiny=True)
    made = [(folder / "config.json").stat().st_mtime_ns for folder in folders]
    assert checkpoint.models(2, tiny=True) == folders
    assert [(folder / "config.json").stat().st_mtime_ns for folder in folders] == made


SKEWED = checkpoint.Shape("moe-skewed", 256, 3, 32, 4, 32, 4, 2, 64, 512)


@pytest.mark.parametrize(("skew", "least", "most"), [(0.0, 0.1, 0.2), (0.5, 0.28, 0.5)])
def test_routers_prefer_experts_as_much_as_the_skew_says(
    tmp_path: Path, skew: float, least: float, most: float
) -> None:
    """Transformers' choices over two answers: an eighth of the experts gets an eighth of them
    without skew, but for chance, and with 0.5 more than a third."""
    checkpoint.write(tmp_path, replace(SKEWED, skew=skew))
    choices = expert_rules.recorded(tmp_path, answers=2, tokens=61)
    assert choices.shape == (120, SKEWED.layers, SKEWED.top_k)
    top, gini = expert_rules.concentration(choices, SKEWED.experts)
    assert least < top < most
    assert (gini > 0.35) == (skew > 0)


def test_a_skew_changes_routers_embeddings_and_head_alone(tmp_path: Path) -> None:
    tensors = []
    for skew in (0.0, 0.5):
        folder = tmp_path / str(skew)
        checkpoint.write(folder, replace(checkpoint.TINY, skew=skew))
        files = sorted(folder.glob("*.safetensors"))
        tensors.append({name: t for file in files for name, t in load_file(file).items()})
    flat, skewed = tensors
    changed = {name for name, tensor in flat.items() if not torch.equal(tensor, skewed[name])}
    assert changed == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.mlp.gate.weight" for i in range(checkpoint.TINY.layers)),
    }


def test_int4_codes_are_those_of_compressed_tensors(tmp_path: Path) -> None:
    shape = replace(checkpoint.TINY, layers=1)
    int4_checkpoint.write(tmp_path, shape)
    spec = read_model(tmp_path)
    assert (spec.layers, spec.hidden) == (shape.layers, shape.hidden)
    tensors = load_file(tmp_path / "model-00001-of-00002.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj"
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, torch.Size((rows, columns)))
    assert set(codes.unique().tolist()) == set(range(-8, 8))
    scales = tensors[f"{name}.weight_scale"].float().repeat_interleave(int4_checkpoint.GROUP, 1)
    weight = codes.float() * scales
    assert weight.std().item() == pytest.approx(columns**-0.5, rel=0.05)
    # Experts have the same codes, and weights of their own.
    other = tensors["model.layers.0.mlp.experts.4.up_proj.weight_scale"]
    assert not torch.equal(other, tensors[f"{name}.weight_scale"])


def test_the_large_model_has_the_shape_of_qwen3_30b_a3b() -> None:
    file = Path(catalogue.__file__).parent / "Qwen3-30B-A3B.json"
    published, config = json.loads(file.read_text()), checkpoint.config(large.SHAPE)
    for field in (
        *("hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "head_dim"),
        *("moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    ):
        assert config[field] == published[field], field
