"""Front end fixtures: one server over fake devices for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crosspool.frontend import compat
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.front_end import MODELS, FrontEndServer, deployment
from support.server import DEMO

compat.install()

TEXT = " the quick brown fox jumps over the lazy dog and then it runs away for good"


@pytest.fixture(scope="session")
def tokenizers() -> list[PreTrainedTokenizerBase]:
    return [AutoTokenizer.from_pretrained(str(DEMO / name)) for name in MODELS]


@pytest.fixture(scope="session")
def scripted(tokenizers: list[PreTrainedTokenizerBase]) -> list[list[int]]:
    """The tokens that each model's fake device repeats."""
    return [t.encode(TEXT, add_special_tokens=False) for t in tokenizers]


@pytest.fixture(scope="session")
def script(scripted: list[list[int]]) -> Callable[[int, list[int], int], int]:
    def next_token(model: int, tokens: list[int], prompt: int) -> int:
        return scripted[model][(len(tokens) - prompt) % len(scripted[model])]

    return next_token


@pytest.fixture(scope="package")
def server(script: Callable[[int, list[int], int], int]) -> Iterator[FrontEndServer]:
    running = FrontEndServer(deployment(sglang={"enable_cache_report": True}), script)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture
def slow(server: FrontEndServer) -> Iterator[None]:
    """Makes steps so slow that a test can act while one runs."""
    (device,) = server.devices
    device.step_seconds = 0.05
    yield
    for device in server.devices:  # the scheduler may have been replaced, and they with it
        device.step_seconds = 0.0
