"""The bundled models on the platform, and the reference in torch on the CPU that they are held
against."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import crosspool
import torch
from crosspool.models.registry import read_model
from crosspool.models.spec import ModelSpec
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.ranks.host.attention import AttentionPart
from crosspool.ranks.host.ffn import FFNPart
from crosspool.ranks.host.step_batch import RowSpan, StepBatch
from crosspool.ranks.weights import TORCH_DTYPES
from crosspool.weightpool.placement import FFNShard

from benchmark.gpu_report.platform import Platform

DEMO = Path(crosspool.__file__).parent / "demo"
PAGE_SIZE, PAGES = 16, 64
_WHOLE = FFNShard(rank=0, ranks=1, parallel="tp")


def spec_of(platform: Platform, name: str) -> ModelSpec:
    """A bundled model in float32, cut to the layers of the platform's scale."""
    spec = read_model(DEMO / name, dtype="float32")
    return dataclasses.replace(spec, ffn=spec.ffn[: platform.scale.layers])


def kv_shape(spec: ModelSpec) -> tuple[int, ...]:
    return PAGES, spec.layers, PAGE_SIZE, spec.kv_width


def load(platform: Platform, name: str, kv: torch.Tensor | None = None) -> GPUModel:
    """A bundled model; its KV is full of NaN unless given."""
    path, device, spec = DEMO / name, platform.device, spec_of(platform, name)
    if kv is None:
        kv = torch.full(kv_shape(spec), torch.nan, device=device)
    return GPUModel(
        spec,
        GPUAttention(spec, path, device, PAGES * PAGE_SIZE, lambda _: None),
        GPUFFN(spec, path, _WHOLE, device, lambda _: None),
        kv,
    )


class Reference:
    """A bundled model in torch on the CPU, as the host's ranks compute it."""

    def __init__(self, platform: Platform, name: str) -> None:
        self.spec = spec_of(platform, name)
        self.attention = AttentionPart(self.spec, DEMO / name, lambda _: None)
        self.ffn = FFNPart(self.spec, DEMO / name, _WHOLE, lambda _: None)
        self.kv = torch.full(kv_shape(self.spec), torch.nan, dtype=TORCH_DTYPES[self.spec.dtype])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The first ``count`` greedy tokens after a prompt."""
        pages, chosen, new = torch.arange(PAGES), [], list(prompt)
        start = 0
        while len(chosen) < count:
            positions = torch.arange(start, start + len(new))
            batch = StepBatch(positions, [RowSpan(0, len(new), start, pages)])
            residual = self.attention.embed(torch.tensor(new))
            for layer in range(self.spec.layers):
                residual, normed = self.attention.attend(layer, residual, batch, self.kv)
                residual = residual + self.ffn.forward(layer, normed)
            chosen.append(int(self.attention.logits(residual[-1:]).argmax()))
            start, new = start + len(new), chosen[-1:]
        return chosen


def prompts(count: int, length: int) -> list[list[int]]:
    """Prompts of random tokens, the same in every run."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(6, 2000, (count, length), generator=generator).tolist()
