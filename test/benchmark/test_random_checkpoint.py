"""The benchmarks' checkpoint, as transformers reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crosspool.models.registry import read_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark import checkpoint


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
