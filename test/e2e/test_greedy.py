"""Greedy tokens through HTTP equal transformers', while the other models are under load."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.greedy import NEW_TOKENS, generate, prompts_of
from support.server import DEMO, TINY_MODELS, Server
from transformers import AutoModelForCausalLM


@functools.cache
def reference(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / model, dtype=torch.float32).eval()


@torch.inference_mode()
def check_model(server: Server, model: str, every: int = 1) -> None:
    """Asks for one of ``every`` so many prompts."""
    prompts = prompts_of(DEMO / model)[::every]
    over = threading.Event()

    def load(other: str) -> int:
        served = 0
        while not over.is_set():
            generate(server, other, prompts[served % len(prompts)])
            served += 1
        return served

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(load, m) for m in TINY_MODELS if m != model]
        try:
            answers = list(pool.map(lambda p: generate(server, model, p), prompts))
        finally:
            over.set()
        assert all(other.result() > 0 for other in others)
    assert len({tuple(tokens) for tokens in answers}) > len(prompts) // 2
    for prompt, got in zip(prompts, answers, strict=True):
        # Each token is the likeliest after those before it, so the answer is the greedy one.
        logits = reference(model)(torch.tensor([prompt + got[:-1]])).logits[0, -NEW_TOKENS:]
        assert got == logits.argmax(-1).tolist(), (model, prompt)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_equal_transformers(server: Server, model: str) -> None:
    check_model(server, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_equal_transformers_under_the_host_loop(
    host_server: Server, model: str
) -> None:
    check_model(host_server, model, every=4)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_equal_transformers_on_two_devices(split_server: Server, model: str) -> None:
    check_model(split_server, model)
