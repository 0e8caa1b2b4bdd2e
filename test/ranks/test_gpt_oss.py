"""gpt-oss on device processes over contexts of several windows: every distribution is that of
transformers' model, with experts in floats and in MXFP4, on every path of instructions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from crosspool.kernels.isa import available_isas
from make_random_checkpoint import make_random_checkpoint
from support.families import reference_model
from support.long_contexts import distributions, generated
from support.quantized import quantize_gpt_oss
from support.quantized_models import GPT_OSS
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmark.device_driver import DeviceDriver

CORES = sorted(os.sched_getaffinity(0))
FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one device": {"kv": [FIRST], "weights": [FIRST]},
    "TP": {"kv": [FIRST], "weights": [FIRST, SECOND]},
    "EP": {"kv": [FIRST], "weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}
VOCAB, WINDOW = 160, 100
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": WINDOW,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with experts in MXFP4, and one of the floats that they stand for."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    path = make_random_checkpoint("gpt_oss", folder / "random", SHAPE, "float32", seed=2)
    return quantize_gpt_oss(path, folder, GPT_OSS)


@pytest.mark.parametrize(
    ("placement", "loop", "stored"),
    [
        ("TP", "resident", "floats"),
        ("TP", "resident", "mxfp4"),
        pytest.param("EP", "resident", "mxfp4", marks=pytest.mark.slow),
        pytest.param("one device", "resident", "floats", marks=pytest.mark.slow),
        pytest.param("one device", "host", "floats", marks=pytest.mark.slow),
        pytest.param("TP", "host", "mxfp4", marks=pytest.mark.slow),
    ],
)
def test_long_contexts_equal_transformers(
    folders: tuple[Path, Path], placement: str, loop: str, stored: str
) -> None:
    if len(CORES) == 1 and placement != "one device":
        pytest.skip("needs two cores")
    path = folders[stored == "floats"]
    sequences, found = generated(path, VOCAB, loop=loop, **PLACEMENTS[placement])
    expected = distributions(reference_model(folders[1], torch.float32), sequences)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("isa", available_isas())
def test_every_path_of_instructions(
    folders: tuple[Path, Path], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSPOOL_CPU_ISA", isa)
    fields = {"loop": "resident"} | PLACEMENTS["one device"]
    sequences, found = generated(folders[0], VOCAB, DeviceDriver, **fields)
    expected = distributions(reference_model(folders[1], torch.float32), sequences)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("stored", ["floats", "mxfp4"])
def test_bfloat16_stays_as_close_to_float32_as_transformers(
    folders: tuple[Path, Path], stored: str
) -> None:
    """Both compute with the same weights, which are rounded to bfloat16; MXFP4's are exact."""
    path, floats = folders[stored == "floats"], folders[1]
    file = path / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"dtype": "bfloat16"}))
    try:
        sequences, found = generated(path, VOCAB, loop="resident", **PLACEMENTS["one device"])
    finally:
        file.write_text(before)
    theirs = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16).eval()
    of_theirs = distributions(theirs, sequences)
    exact = distributions(theirs.float(), sequences)

    def error(of: list[Tensor]) -> float:
        pairs = zip(of, exact, strict=True)
        return float(torch.cat([(one - right).abs().mean(1) for one, right in pairs]).mean())

    assert 0 < error(found) < 1.1 * error(of_theirs)
