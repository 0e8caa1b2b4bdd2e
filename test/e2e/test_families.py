"""Greedy tokens through HTTP equal transformers', for a small model of random weights of every
family that has no bundled one, some of them as parts of multimodal models. One server has them
all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES, reference_model
from support.greedy import NEW_TOKENS, generate, prompts_of
from support.multimodal import as_multimodal
from support.server import DEMO, Server, two_device_flags

FAMILIES = (
    "glm4-moe",
    "qwen2-moe",
    "qwen3",
    "llama3",
    "minimax-m2",
    "ernie",
    "hunyuan-alpha",
    "granite",
    "phimoe-long",
    "qwen3-next",
    "qwen3.5",
    "llama4",
)
"""Their shapes."""
FLAGS = ("--kv-pool-bytes", "128MiB")
FEW = 4
"""Prompts of each model."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("families")
    return [
        make_random_checkpoint(
            SHAPES[name][0],
            folder / name,
            SHAPES[name][1],
            "float32",
            seed=11,
            tokenizer=DEMO / "tiny-qwen3-moe",
        )
        for name in FAMILIES
    ]


@pytest.fixture(scope="module")
def served(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same, but those of language models of multimodal models as they are published."""
    folder = tmp_path_factory.mktemp("served")
    return [as_multimodal(path, folder / path.name) for path in checkpoints]


@pytest.fixture(scope="module")
def server(served: list[Path]) -> Iterator[Server]:
    with Server(FLAGS, models=served) as server:
        yield server


def check(server: Server, checkpoint: Path, prompts: list[list[int]]) -> None:
    """Asks for all prompts at once."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: generate(server, checkpoint.name, p), prompts))
    reference = reference_model(checkpoint, torch.float32)
    for prompt, found in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + found])).logits[0]
        expected = logits[len(prompt) - 1 : -1].argmax(dim=1)
        assert found == expected.tolist(), checkpoint.name
    assert len({tuple(answer) for answer in answers}) > len(prompts) // 2
    assert all(len(answer) == NEW_TOKENS for answer in answers)


@pytest.mark.parametrize("index", range(len(FAMILIES)), ids=FAMILIES)
def test_greedy_tokens_equal_transformers(
    server: Server, checkpoints: list[Path], index: int
) -> None:
    prompts = prompts_of(checkpoints[index])
    check(server, checkpoints[index], prompts[:: len(prompts) // FEW])


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["host loop", "two devices"])
def test_greedy_tokens_equal_transformers_elsewhere(
    checkpoints: list[Path], served: list[Path], placement: str
) -> None:
    flags = two_device_flags() if placement == "two devices" else ["--loop", "host"]
    with Server([*FLAGS, *flags], models=served) as server:
        for checkpoint in checkpoints:
            prompts = prompts_of(checkpoint)
            check(server, checkpoint, prompts[:: len(prompts) // FEW])
