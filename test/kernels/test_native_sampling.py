"""Native sampling against crosspool.ranks.sampler, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from crosspool.kernels.isa import available_isas
from crosspool.ranks.sampler import SamplingRow, sample, uniform
from crosspool.transport.messages import Sampling
from support.native_kernels import NativeKernels
from support.native_kernels import uniform as native_uniform


@pytest.fixture(params=available_isas())
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return NativeKernels(torch.float32, request.param)


def test_draws_are_numpys() -> None:
    for seed in (0, 1, 2**63 + 11, 2**64 - 1, -5):
        for position in (0, 1, 77, 2**40):
            assert native_uniform(seed, position) == uniform(seed, position)


@pytest.mark.parametrize("count", [1, 5, 16, 1000])
def test_argmax(kernels: NativeKernels, count: int) -> None:
    for _ in range(20):
        logits = torch.randint(-9, 9, (count,)).float() - 20.0
        assert kernels.argmax(logits) == int(logits.argmax())
    logits[count // 2 :] = math.nan
    assert kernels.argmax(logits) == count // 2
    assert kernels.argmax(torch.full((count,), -math.inf)) == 0


RULES = (
    {},
    {"temperature": 0.3},
    {"top_k": 1 << 20},
    {"top_k": 5},
    {"top_k": 1500},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.02},
    {"min_p": 1e-5, "temperature": 3.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "temperature": 0.8},
    {"top_k": 40, "top_p": 0.0001},
)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_same_tokens_are_drawn(
    kernels: NativeKernels, rule: dict[str, float], spread: float
) -> None:
    vocab, rows = 3001, 60
    # Logits of a bfloat16 model have many equals.
    logits = (torch.randn(rows, vocab) * spread).bfloat16().float()
    samplings = [Sampling(seed=i, **rule) for i in range(rows)]  # type: ignore[arg-type]
    expected = sample(
        logits, [SamplingRow(s, [], position=i + 3) for i, s in enumerate(samplings)], []
    )
    found = [
        kernels.sample(
            logits[i],
            uniform(s.seed, i + 3),
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
        )
        for i, s in enumerate(samplings)
    ]
    assert found == expected.tolist()
    assert spread == 8.0 or "top_p" in rule or rule.get("top_k") == 5 or len(set(found)) > 10


@pytest.mark.parametrize("draw", [0.0, 0.25, 1.0 - 2**-53])
def test_barred_tokens_are_never_drawn(kernels: NativeKernels, draw: float) -> None:
    logits = torch.full((100,), -math.inf)
    logits[[20, 60]] = 1.0
    for top_k in (-1, 50):
        token = kernels.sample(logits, draw, temperature=1.0, top_k=top_k, top_p=1.0, min_p=0.0)
        assert token == (20 if draw < 0.5 else 60)


def test_a_row_without_numbers_ends_at_the_last_token(kernels: NativeKernels) -> None:
    logits = torch.full((100,), math.nan)
    for top_k in (-1, 5):
        found = kernels.sample(logits, 0.5, temperature=1.0, top_k=top_k, top_p=1.0, min_p=0.0)
        assert found == 99


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="avx3"):
        NativeKernels(torch.float32, "avx3")
