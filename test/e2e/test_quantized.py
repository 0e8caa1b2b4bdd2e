"""Quantised checkpoints and GGUF files through HTTP: greedy tokens are those of transformers on the
floats that quantised weights stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import gguf_files, quantized
from support.greedy import NEW_TOKENS, PROMPTS, generate, prompts_of
from support.quantized import Written
from support.quantized_models import AWQ, FP8, GPTQ, INT8_OF_CHANNELS, MXFP4, compressed_config
from support.server import DEMO, Server
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

_PLAIN = ["re:.*mlp.gate$", "lm_head"]
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Written]]] = {
    "gptq": ("tiny-qwen3-moe", GPTQ, quantized.gptq),
    "awq": ("tiny-deepseek-v2", AWQ, quantized.awq),
    "fp8": ("tiny-glm4-moe-lite", FP8, quantized.fp8_block),
    "int8": (
        "tiny-deepseek-v2",
        compressed_config("int-quantized", _PLAIN, **INT8_OF_CHANNELS),
        lambda w: quantized.compressed(w, "int-quantized", **INT8_OF_CHANNELS),
    ),
    "mxfp4": (
        "tiny-qwen3-moe",
        compressed_config("mxfp4-pack-quantized", _PLAIN, **MXFP4),
        lambda w: quantized.compressed(w, "mxfp4-pack-quantized", scale_dtype=torch.uint8, **MXFP4),
    ),
}


GGUF_MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "gguf": ("tiny-qwen3-moe", {"ffn_down": "Q8_0", "token_embd": "F16", "": "Q4_0"}),
    "gguf-pieces": ("tiny-deepseek-v2", {"": "Q8_0"}),
}
"""Types by parts of the names of tensors."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A quantised checkpoint and one of the floats that it stands for, by the model's name."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        name: quantized.quantize_checkpoint(DEMO / model, folder / name, write, config)
        for name, (model, config, write) in MODELS.items()
    }
    for name, (model, kinds) in GGUF_MODELS.items():

        def kind_of(tensor: str, kinds: dict[str, str] = kinds) -> str:
            return next(kind for part, kind in kinds.items() if part in tensor)

        found[name] = gguf_files.convert(DEMO / model, folder / name, kind_of)
    return found


@pytest.fixture(scope="module")
def quantized_server(made: dict[str, tuple[Path, Path]]) -> Iterator[Server]:
    flags = ["--dtype", "float32", "--kv-pool-bytes", "128MiB"]
    for name, (stored, _) in made.items():
        flags += ["--model-path", str(stored), "--served-model-name", name]
    with Server(flags, models=()) as running:
        yield running


@pytest.mark.parametrize("name", [*MODELS, *GGUF_MODELS])
@torch.inference_mode()
def test_greedy_tokens_equal_transformers(
    quantized_server: Server, made: dict[str, tuple[Path, Path]], name: str
) -> None:
    floats = made[name][1]
    prompts = prompts_of(floats)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: generate(quantized_server, name, prompt), prompts))
    assert len({tuple(tokens) for tokens in answers}) > PROMPTS // 2
    reference = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        # Each token is the likeliest after those before it, so the answer is the greedy one.
        logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0, -NEW_TOKENS:]
        assert answer == logits.argmax(-1).tolist(), (name, prompt)


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_chats_take_the_template_of_the_gguf_file(quantized_server: Server, name: str) -> None:
    model = GGUF_MODELS[name][0]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / model)
    messages = [{"role": "user", "content": "What is a pool?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = tokenizer.encode(prompt, add_special_tokens=False)
    status, answer = quantized_server.post(
        "/v1/chat/completions", {"model": name, "messages": messages, "max_tokens": 4}
    )
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert answer["choices"][0]["message"]["content"]
