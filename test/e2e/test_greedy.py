"""Greedy tokens through HTTP equal transformers', while the other models are under load."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.greedy import NEW_TOKENS, PROMPTS, generate, prompts_of
from support.server import DEMO, TINY_MODELS, Server
from transformers import AutoModelForCausalLM


@functools.cache
def reference_tokens(model: str) -> list[list[int]]:
    """transformers' greedy continuation of every prompt in fp32, eos ignored."""
    reference = AutoModelForCausalLM.from_pretrained(DEMO / model, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for prompt in prompts_of(DEMO / model):
            cache, tokens, ids = None, [], torch.tensor([prompt])
            for _ in range(NEW_TOKENS):
                out = reference(ids, past_key_values=cache, use_cache=True)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                tokens.append(int(ids))
            answers.append(tokens)
    return answers


def check_model(server: Server, model: str) -> None:
    prompts, expected = prompts_of(DEMO / model), reference_tokens(model)
    over = threading.Event()

    def load(other: str) -> int:
        served = 0
        while not over.is_set():
            generate(server, other, prompts[served % PROMPTS])
            served += 1
        return served

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(load, m) for m in TINY_MODELS if m != model]
        try:
            answers = list(pool.map(lambda p: generate(server, model, p), prompts))
        finally:
            over.set()
        assert all(other.result() > 0 for other in others)
    assert len({tuple(tokens) for tokens in expected}) > PROMPTS // 2
    for prompt, got, want in zip(prompts, answers, expected, strict=True):
        assert got == want, (model, prompt)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_equal_transformers(server: Server, model: str) -> None:
    check_model(server, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_equal_transformers_under_the_host_loop(
    host_server: Server, model: str
) -> None:
    check_model(host_server, model)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_greedy_tokens_equal_transformers_on_two_devices(split_server: Server, model: str) -> None:
    check_model(split_server, model)
