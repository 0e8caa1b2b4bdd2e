"""Distributions over contexts of more than a hundred tokens, of device processes and of
transformers' models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crosspool.transport.messages import Logprobs
from support.warm_devices import WarmDriver
from torch import Tensor

from benchmark.device_driver import DeviceDriver, Generation

DECODE_STEPS = 32
LENGTHS = (560, 90, 3)
"""Prompts of several ranges of keys, of less than a window of 100 tokens, which decode reaches, and
of a few tokens."""


def generated(
    path: Path, vocab: int, processes: type[DeviceDriver] = WarmDriver, **fields: Any
) -> tuple[list[list[int]], list[Tensor]]:
    """Has device processes write after prompts of random tokens below ``vocab``. Returns each
    request's tokens, and the distribution after each but the last."""
    everything = Logprobs(output=True, prompt_start=0, token_ids=tuple(range(vocab)))
    random = np.random.default_rng(11)
    requests = [
        Generation(
            0,
            [int(token) for token in random.integers(0, vocab, length)],
            DECODE_STEPS,
            logprobs=everything,
            chunk=150,
        )
        for length in LENGTHS
    ]
    with processes([path], kv_pool_bytes=64 << 20, **fields) as driver:
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
