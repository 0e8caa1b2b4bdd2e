"""Greedy generation through HTTP: 20 prompts of 64 tokens for each model."""

from __future__ import annotations

from pathlib import Path

from support.prompts import sentences
from support.server import Server
from transformers import AutoTokenizer

PROMPTS = 20
NEW_TOKENS = 64


def prompts_of(folder: Path) -> list[list[int]]:
    """Token ids of the prompts, by the tokenizer of a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text) for text in sentences(PROMPTS)]


def generate(server: Server, model: str, prompt: list[int]) -> list[int]:
    """Returns the model's greedy continuation, whether or not it ends itself."""
    status, answer = server.post(
        f"/m/{model}/generate",
        {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": NEW_TOKENS,
                "ignore_eos": True,
            },
        },
    )
    assert status == 200, answer
    return list(answer["output_ids"])
