"""A server whose models hold their KV cache in floats of 8 bits: greedy tokens are those of
transformers with a cache that is rounded in the same way, and the pool has room for more tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.families import reference_model
from support.greedy import NEW_TOKENS, generate, prompts_of
from support.rounded_cache import logits_of
from support.server import DEMO, Server

MODELS = {
    "plain": ("tiny-qwen3-moe", "auto"),
    "gqa": ("tiny-qwen3-moe", "fp8_e4m3"),
    "mla": ("tiny-deepseek-v2", "fp8_e5m2"),
}


@pytest.fixture(scope="module")
def float8_server() -> Iterator[Server]:
    flags = ["--dtype", "float32", "--kv-pool-bytes", "32MiB", "--context-length", "512"]
    for name, (folder, kv_cache_dtype) in MODELS.items():
        flags += ["--model-path", str(DEMO / folder), "--served-model-name", name]
        flags += ["--kv-cache-dtype", kv_cache_dtype]
    with Server(flags, models=()) as running:
        yield running


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_greedy_tokens_equal_transformers(float8_server: Server, name: str) -> None:
    folder, kv_cache_dtype = MODELS[name]
    reference = reference_model(DEMO / folder, torch.float32)
    for prompt in prompts_of(DEMO / folder)[:4]:
        for _ in range(2):  # the second time, the prompt is in the prefix cache
            output = generate(float8_server, name, prompt)
            assert len(output) == NEW_TOKENS
            logits = logits_of(reference, prompt + output, kv_cache_dtype)[len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
            # Sums in another order move an element over a rounding border now and then.
            assert (logits.amax(dim=1) - chosen).max() < (
                0.05 if kv_cache_dtype != "auto" else 1e-3
            )
    status = float8_server.get("/crosspool/status")
    (told,) = [model for model in status["models"] if model["name"] == name]
    assert told["cached_tokens"] > 0


def test_the_status_counts_a_byte_per_element(float8_server: Server) -> None:
    status = float8_server.get("/crosspool/status")
    told = {model["name"]: model for model in status["models"]}
    assert [told[name]["kv_dtype"] for name in MODELS] == ["float32", "fp8_e4m3", "fp8_e5m2"]
    plain, rounded = told["plain"], told["gqa"]
    assert plain["kv_bytes_per_token"] == 4 * rounded["kv_bytes_per_token"]
    assert rounded["pool_tokens"] == 4 * plain["pool_tokens"]
    info = float8_server.get("/m/gqa/get_server_info")
    assert info["kv_cache_dtype"] == "fp8_e4m3"
