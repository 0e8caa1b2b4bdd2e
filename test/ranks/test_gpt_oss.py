"""gpt-oss on device processes over contexts of several windows: every distribution is that of
transformers' model, with experts in floats and in MXFP4, on every path of instructions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crosspool.kernels.isa import available_isas
from crosspool.transport.messages import Logprobs
from make_random_checkpoint import make_random_checkpoint
from support.families import reference_model
from support.quantized import quantize_gpt_oss
from support.quantized_models import GPT_OSS
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmark.device_driver import DeviceDriver, Generation

CORES = sorted(os.sched_getaffinity(0))
FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one device": {"kv": [FIRST], "weights": [FIRST]},
    "TP": {"kv": [FIRST], "weights": [FIRST, SECOND]},
    "EP": {"kv": [FIRST], "weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}
VOCAB, WINDOW, DECODE_STEPS = 160, 100, 32
LENGTHS = (560, 90, 3)
"""Prompts of several ranges of keys, of less than the window, which decode reaches, and of a few
tokens."""
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


def generated(path: Path, **fields: Any) -> tuple[list[list[int]], list[Tensor]]:
    """Returns each request's tokens, and the distribution after each but the last."""
    everything = Logprobs(output=True, prompt_start=0, token_ids=tuple(range(VOCAB)))
    random = np.random.default_rng(11)
    requests = [
        Generation(
            0,
            [int(token) for token in random.integers(0, VOCAB, length)],
            DECODE_STEPS,
            logprobs=everything,
            chunk=150,
        )
        for length in LENGTHS
    ]
    with DeviceDriver([path], kv_pool_bytes=64 << 20, **fields) as driver:
        driver.generate(requests)
    found = []
    for request in requests:
        rows = [*request.prompt_logprobs[1:], *request.output_logprobs]
        found.append(torch.tensor([[value for value, _ in row.token_ids] for row in rows]))
    return [request.prompt + request.output for request in requests], found


@torch.inference_mode()
def distributions(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The same of transformers' model."""
    logits = [model(torch.tensor([tokens])).logits[0, :-1] for tokens in sequences]
    assert all(of.float().std() > 0.3 for of in logits)  # else tolerances would say nothing
    return [torch.log_softmax(of.double(), dim=-1).float() for of in logits]


@pytest.mark.parametrize("stored", ["floats", "mxfp4"])
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
    folders: tuple[Path, Path], stored: str, placement: str, loop: str
) -> None:
    if len(CORES) == 1 and placement != "one device":
        pytest.skip("needs two cores")
    path = folders[stored == "floats"]
    sequences, found = generated(path, loop=loop, **PLACEMENTS[placement])
    expected = distributions(reference_model(folders[1], torch.float32), sequences)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("isa", available_isas())
def test_every_path_of_instructions(
    folders: tuple[Path, Path], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSPOOL_CPU_ISA", isa)
    sequences, found = generated(folders[0], loop="resident", **PLACEMENTS["one device"])
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
        sequences, found = generated(path, loop="resident", **PLACEMENTS["one device"])
    finally:
        file.write_text(before)
    theirs = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16).eval()
    of_theirs = distributions(theirs, sequences)
    exact = distributions(theirs.float(), sequences)

    def error(of: list[Tensor]) -> float:
        pairs = zip(of, exact, strict=True)
        return float(torch.cat([(one - right).abs().mean(1) for one, right in pairs]).mean())

    assert 0 < error(found) < 1.1 * error(of_theirs)
