"""gpt-oss through HTTP, with experts in floats and in MXFP4: greedy tokens are transformers', and
chats go through the checkpoint's template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from make_random_checkpoint import make_random_checkpoint
from support.greedy import NEW_TOKENS, PROMPTS, generate, prompts_of
from support.quantized import quantize_gpt_oss
from support.quantized_models import GPT_OSS
from support.server import DEMO, Server
from transformers import AutoModelForCausalLM, AutoTokenizer

FAST = 4
"""Prompts of a run without the slow tests."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpt-oss")
    path = make_random_checkpoint(
        "gpt_oss",
        folder / "random",
        {"num_local_experts": 8, "num_hidden_layers": 4, "sliding_window": 24},
        "float32",
        seed=4,
        tokenizer=DEMO / "tiny-qwen3-moe",
    )
    stored, floats = quantize_gpt_oss(path, folder, GPT_OSS)
    return {"mxfp4": stored, "floats": floats}


@pytest.fixture(scope="module")
def running(folders: dict[str, Path]) -> Iterator[Server]:
    flags = ["--kv-pool-bytes", "64MiB", "--tool-call-parser", "gpt-oss"]
    for name, path in folders.items():
        flags += ["--model-path", str(path), "--served-model-name", name]
    with Server(flags, models=()) as server:
        yield server


@pytest.mark.parametrize("name", ["mxfp4", "floats"])
@pytest.mark.parametrize("count", [FAST, pytest.param(PROMPTS, marks=pytest.mark.slow)])
@torch.inference_mode()
def test_greedy_tokens_equal_transformers(
    running: Server, folders: dict[str, Path], name: str, count: int
) -> None:
    prompts = prompts_of(folders["floats"])[:count]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: generate(running, name, prompt), prompts))
    assert len({tuple(tokens) for tokens in answers}) > count // 2
    reference = AutoModelForCausalLM.from_pretrained(folders["floats"], dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        # Each token is the likeliest after those before it, so the answer is the greedy one.
        logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0, -NEW_TOKENS:]
        assert answer == logits.argmax(-1).tolist(), (name, prompt)


def test_chats_take_the_template_of_the_checkpoint(
    running: Server, folders: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["floats"])
    messages = [{"role": "user", "content": "What is a pool?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = tokenizer.encode(prompt, add_special_tokens=False)
    status, answer = running.post(
        "/v1/chat/completions", {"model": "mxfp4", "messages": messages, "max_tokens": 8}
    )
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert answer["choices"][0]["message"]["content"]


def test_tool_calls_in_harmony_are_parsed(running: Server) -> None:
    """A random model has to be held to the format."""
    function = {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    written = (
        "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>'
    )
    status, answer = running.post(
        "/v1/chat/completions",
        {
            "model": "mxfp4",
            "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
            "tools": [{"type": "function", "function": function}],
            "regex": re.escape(written),
            "max_tokens": 400,
        },
    )
    assert status == 200, answer
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
