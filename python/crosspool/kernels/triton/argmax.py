"""The best token of a row."""

from __future__ import annotations

import torch


def argmax_blocks(vocab: int) -> int:
    """Blocks of a row that :func:`argmax` looks at on their own."""
    raise NotImplementedError


def argmax(
    logits: torch.Tensor,
    count: torch.Tensor,
    best: torch.Tensor,
    block_value: torch.Tensor,
    block_index: torch.Tensor,
) -> None:
    """best[i] = index of the largest of logits[i]: ``logits`` float32 [bucket, vocab], ``best``
    int32 [bucket]; the lowest index among equals; a NaN is larger than any number (torch.argmax's
    rules). Workspaces: float32 and int32 [bucket, argmax_blocks(vocab)]."""
    raise NotImplementedError
