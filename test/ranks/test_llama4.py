"""The language model of a multimodal Llama 4 on device processes, over contexts of several chunks:
every distribution is that of transformers' model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from make_random_checkpoint import make_random_checkpoint
from support.families import reference_model
from support.long_contexts import distributions, generated
from support.multimodal import as_multimodal

CORES = sorted(os.sched_getaffinity(0))
FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one device": {"kv": [FIRST], "weights": [FIRST]},
    "TP": {"kv": [FIRST], "weights": [FIRST, SECOND]},
    "EP": {"kv": [FIRST], "weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}
VOCAB = 160
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_chunk_size": 100,
    "floor_scale": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 160,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 8,
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of the language model alone, and one of a multimodal model that has it."""
    folder = tmp_path_factory.mktemp("llama4")
    text = make_random_checkpoint("llama4_text", folder / "text", SHAPE, "float32", seed=2)
    return text, as_multimodal(text, folder / "whole")


@pytest.mark.parametrize(
    ("placement", "loop"),
    [
        ("TP", "resident"),
        pytest.param("EP", "resident", marks=pytest.mark.slow),
        pytest.param("one device", "resident", marks=pytest.mark.slow),
        pytest.param("one device", "host", marks=pytest.mark.slow),
        pytest.param("TP", "host", marks=pytest.mark.slow),
    ],
)
def test_long_contexts_equal_transformers(
    paths: tuple[Path, Path], placement: str, loop: str
) -> None:
    if len(CORES) == 1 and placement != "one device":
        pytest.skip("needs two cores")
    text, whole = paths
    sequences, found = generated(whole, VOCAB, loop=loop, **PLACEMENTS[placement])
    expected = distributions(reference_model(text, torch.float32), sequences)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
