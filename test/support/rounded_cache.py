"""Transformers' models with a KV cache whose elements are rounded to floats of 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def rounded(values: Tensor, float8: torch.dtype) -> Tensor:
    """The nearest numbers of the format, ties to even; the largest finite one beyond it."""
    largest = torch.finfo(float8).max
    return values.clamp(-largest, largest).to(float8).to(values.dtype)


class RoundedCache(DynamicCache):
    """Rounds keys and values when they come. Of a model with latent attention, whose keys and
    values are projections of a latent, it rounds the rotated features of the keys alone:
    :func:`logits_of` has the latent rounded."""

    def __init__(self, model: PreTrainedModel, float8: torch.dtype) -> None:
        super().__init__(config=model.config)
        self._float8 = float8
        self._rotated = getattr(model.config, "qk_rope_head_dim", None)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._rotated is None:
            key_states = rounded(key_states, self._float8)
            value_states = rounded(value_states, self._float8)
        else:
            latent, rotated = key_states.tensor_split([-self._rotated], dim=-1)
            key_states = torch.cat((latent, rounded(rotated, self._float8)), dim=-1)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def logits_of(model: PreTrainedModel, tokens: list[int], kv_cache_dtype: str) -> Tensor:
    """Logits [tokens, vocab] of a sequence with a cache of the dtype."""
    if kv_cache_dtype == "auto":
        plain: Tensor = model(torch.tensor([tokens])).logits[0]
        return plain
    float8 = FLOAT8[kv_cache_dtype]
    norms = [m for name, m in model.named_modules() if name.endswith("kv_a_layernorm")]
    hooks = [norm.register_forward_hook(lambda _, __, out: rounded(out, float8)) for norm in norms]
    try:
        cache = RoundedCache(model, float8)
        logits: Tensor = model(torch.tensor([tokens]), past_key_values=cache).logits[0]
        return logits
    finally:
        for hook in hooks:
            hook.remove()
