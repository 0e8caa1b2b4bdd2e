"""Draws tokens by crosspool.ranks.sampler's rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingRules:
    """One rule per wanted row, [bucket] each, on the device; as
    :class:`crosspool.transport.messages.Sampling`."""

    temperature: torch.Tensor
    """float32; 0: the best token is taken without a draw."""
    top_k: torch.Tensor
    """int32; -1: all; 1: the best token."""
    top_p: torch.Tensor
    """float64; 1 or more: all."""
    min_p: torch.Tensor
    """float32; 0: all."""
    seed: torch.Tensor
    """int64: the bits of the unsigned seed."""
    position: torch.Tensor
    """int64: position in the sequence of the token to pick."""


def uniform(seed: torch.Tensor, position: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = crosspool.ranks.sampler.uniform(seed[i], position[i]), bit for bit: int64 [n] each,
    ``out`` float64 [n]."""
    raise NotImplementedError


def sample(
    logits: torch.Tensor,
    best: torch.Tensor,
    rules: SamplingRules,
    count: torch.Tensor,
    tokens: torch.Tensor,
    probs: torch.Tensor,
) -> None:
    """tokens[i] (int32 [bucket]): the best token where the rule takes it, else the one at which
    the draw falls. ``logits`` float32 [bucket, vocab]; ``best`` as from
    :func:`~.argmax.argmax`; ``probs`` float32 [bucket, vocab] is workspace."""
    raise NotImplementedError
