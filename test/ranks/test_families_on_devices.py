"""Every family on real device processes, all models at once, in every placement: the whole
distribution at each position equals transformers'. That either loop has the same tokens in all of
them, test_resident_executor.py shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crosspool.transport.messages import Logprobs
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES, reference_model
from support.warm_devices import WarmDriver
from transformers import PreTrainedModel

from benchmark.device_driver import Generation

CORES = sorted(os.sched_getaffinity(0))
FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
VOCAB = 160
DECODE_STEPS = 32
PLACEMENTS: dict[str, dict[str, list[str] | str]] = {
    "one device": {"kv": [FIRST], "weights": [FIRST]},
    "two devices": {"kv": [FIRST], "weights": [SECOND]},
    "two FFN ranks, TP": {"kv": [FIRST], "weights": [FIRST, SECOND]},
    "two FFN ranks, EP": {"kv": [SECOND], "weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("families")
    return [
        make_random_checkpoint(
            family, folder / name, {"vocab_size": VOCAB} | overrides, "float32", seed=7
        )
        for name, (family, overrides) in SHAPES.items()
    ]


@pytest.fixture(scope="module")
def references(checkpoints: list[Path]) -> list[PreTrainedModel]:
    return [reference_model(path, torch.float32) for path in checkpoints]


def generations(models: int) -> list[Generation]:
    """Makes two requests of unlike lengths for each model, in one batch, one of several prompt
    chunks."""
    everything = Logprobs(output=True, prompt_start=0, token_ids=tuple(range(VOCAB)))
    random = np.random.default_rng(11)
    return [
        Generation(
            model,
            [int(token) for token in random.integers(0, VOCAB, length)],
            DECODE_STEPS,
            logprobs=everything,
            chunk=9,
        )
        for model in range(models)
        for length in (25, 6)
    ]


FAST = [
    ("one device", "host"),
    ("two FFN ranks, TP", "resident"),
    ("two FFN ranks, EP", "resident"),
]
VARIANTS = [*FAST, ("two devices", "resident"), ("two FFN ranks, TP", "host")]


@pytest.mark.parametrize(
    ("placement", "loop"),
    [
        pytest.param(*variant, marks=() if variant in FAST else pytest.mark.slow)
        for variant in VARIANTS
    ],
)
def test_distributions_equal_transformers(
    placement: str, loop: str, checkpoints: list[Path], references: list[PreTrainedModel]
) -> None:
    if len(CORES) == 1 and placement != "one device":
        pytest.skip("needs two cores")
    requests = generations(len(checkpoints))
    fields: dict[str, Any] = {"kv_pool_bytes": 128 << 20, "loop": loop, **PLACEMENTS[placement]}
    with WarmDriver(checkpoints, **fields) as driver:
        driver.generate(requests)
    for request in requests:
        tokens = request.prompt + request.output
        with torch.inference_mode():
            logits = references[request.model](torch.tensor([tokens])).logits[0]
        assert logits.std() > 0.3  # else the tolerance would say nothing
        expected = torch.log_softmax(logits.double(), dim=-1)[:-1].float()
        answers = [*request.prompt_logprobs[1:], *request.output_logprobs]
        found = torch.tensor([[value for value, _ in answer.token_ids] for answer in answers])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        greedy = expected[len(request.prompt) - 1 :]
        chosen = greedy.gather(1, torch.tensor(request.output)[:, None])[:, 0]
        assert (greedy.amax(dim=1) - chosen).max() < 1e-3
