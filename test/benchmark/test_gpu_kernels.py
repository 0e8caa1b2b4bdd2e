"""The GPU benchmark's cases launch what they say, as far as that shows without a GPU."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path

import pytest
import torch

try:
    importlib.metadata.version("triton")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("triton is not installed", allow_module_level=True)

from support.offline_triton import compiling

from benchmark.gpu_shapes import MODELS, Arrays, Shape, cases

TINY = {
    "hidden": 64,
    "vocab": 320,
    "experts": 8,
    "top_k": 2,
    "width": 32,
}


@pytest.mark.parametrize(
    "model",
    [
        Shape("gqa", q_heads=4, kv_heads=2, head_dim=32, shared_width=0, **TINY),
        Shape(
            "mla",
            q_heads=2,
            kv_heads=1,
            head_dim=16,
            shared_width=64,
            latent=32,
            q_lora=16,
            rope=16,
            v_dim=16,
            **TINY,
        ),
    ],
    ids=lambda model: model.name,
)
def test_cases_launch(model: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("benchmark.gpu_shapes.ROTATION_BYTES", 1 << 16)
    zero = torch.zeros(1, dtype=torch.int32)
    kernels = set()
    with compiling(90) as compiled:
        for case in cases(model, 2, (100,), Arrays(torch.device("cpu"))):
            assert case.bytes > 0
            assert case.layers >= 1
            before = len(compiled)
            case.launch(zero)
            assert len(compiled) > before
            kernels.add(case.kernel)
    assert kernels >= {"linear o", "attend", "gated_mlps", "head_logits, argmax"}


def test_bytes_are_those_of_the_models() -> None:
    """Weights of a layer's experts, by the model's published size."""
    qwen3 = MODELS[0]
    experts = 3 * qwen3.hidden * qwen3.width * qwen3.experts * 48 * 2
    assert math.isclose(experts, 58.0e9, rel_tol=0.01)
