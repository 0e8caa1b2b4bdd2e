"""Argmax, the project's random numbers, and sampling, token by token."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from crosspool.kernels.triton.argmax import ArgmaxWorkspace, argmax
from crosspool.kernels.triton.memory import DeviceMemory
from crosspool.kernels.triton.sampling import SamplingRules, SamplingWorkspace, sample
from crosspool.kernels.triton.uniform import draw_uniform
from support.device_kernels import int32
from torch import Tensor

gpu = pytest.mark.gpu


@pytest.fixture
def sampler() -> ModuleType:
    """The host's, where what it imports is installed."""
    return pytest.importorskip("crosspool.ranks.sampler")


def host_uniform(seed: int, position: int) -> float:
    """Draws as the host's sampler does."""
    key = np.array([seed & (2**64 - 1), position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


@triton.jit
def draws_kernel(seeds: tl.tensor, positions: tl.tensor, out: tl.tensor) -> None:
    i = tl.program_id(0)
    tl.store(out + i, draw_uniform(tl.load(seeds + i), tl.load(positions + i)))


def test_draws_are_numpys(device: torch.device) -> None:
    seeds = [0, 1, -5, 2**63 - 1, -(2**63) + 11]
    positions = [0, 1, 77, 2**40, 5]
    out = torch.empty(5, dtype=torch.float64, device=device)
    keys = (torch.tensor(key, device=device) for key in (seeds, positions))
    draws_kernel[(5,)](*keys, out)
    expected = [host_uniform(s, p) for s, p in zip(seeds, positions, strict=True)]
    assert out.tolist() == expected


def best_tokens(logits: Tensor, rows: int) -> Tensor:
    bucket, vocab = logits.shape
    best = torch.full((bucket,), -7, dtype=torch.int32, device=logits.device)
    workspace = ArgmaxWorkspace.allocate(bucket, vocab, DeviceMemory(logits.device))
    argmax(logits, int32([rows], logits.device), best, workspace)
    return best


def test_the_hosts_draws_are_numpys(sampler: ModuleType) -> None:
    assert sampler.uniform(-5, 77) == host_uniform(-5, 77)


@pytest.mark.parametrize(
    "vocab", [1, 300, 5000, pytest.param(151936, marks=gpu), pytest.param(154880, marks=gpu)]
)
def test_argmax(vocab: int, device: torch.device) -> None:
    logits = torch.randint(-9, 9, (6, vocab), device=device).float() - 20.0
    logits[1] = -math.inf
    logits[2, vocab // 2 :] = math.nan
    logits[3] = 0.0
    logits[3, : vocab // 2] = -0.0  # no smaller than the others
    found = best_tokens(logits, 5).tolist()
    assert found[0] == int((logits[0] == logits[0].max()).nonzero()[0, 0])
    assert found[1:4] == [0, vocab // 2, 0]
    assert found[5] == -7


RULES: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.3},
    {"temperature": 0.0},
    {"top_k": 1},
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


def draw(logits: Tensor, samplings: list[dict[str, Any]], positions: list[int]) -> Tensor:
    """Each row's token by its rule (fields of a Sampling; those it lacks are no filter)."""
    rows, vocab = logits.shape
    device = logits.device

    def column(field: str, default: float, dtype: torch.dtype) -> Tensor:
        values = [sampling.get(field, default) for sampling in samplings]
        return torch.tensor(values, dtype=dtype, device=device)

    rules = SamplingRules(
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", -1, torch.int32),
        top_p=column("top_p", 1.0, torch.float64),
        min_p=column("min_p", 0.0, torch.float32),
        seed=column("seed", 0, torch.int64),
        position=torch.tensor(positions, device=device),
    )
    tokens = torch.full((rows + 1,), -7, dtype=torch.int32, device=device)
    workspace = SamplingWorkspace.allocate(rows, vocab, DeviceMemory(device))
    workspace.probs.fill_(math.nan)
    workspace.candidates.fill_(math.nan)
    sample(logits, best_tokens(logits, rows), rules, int32([rows], device), tokens, workspace)
    assert tokens[rows] == -7
    return tokens[:rows]


@pytest.mark.parametrize("spread", [0.01, 8.0])
@pytest.mark.parametrize(
    "vocab, repeats",
    [(1301, 1), pytest.param(3001, 20, marks=gpu), pytest.param(151936, 4, marks=gpu)],
)
def test_the_same_tokens_are_drawn_as_on_the_host(
    vocab: int, repeats: int, spread: float, sampler: ModuleType, device: torch.device
) -> None:
    from crosspool.transport.messages import Sampling

    rules = [rule for rule in RULES for _ in range(repeats)]
    # As a bfloat16 model's: with many equals.
    logits = (torch.randn(len(rules), vocab) * spread).bfloat16().float()
    samplings = [{"seed": i * 7919 - 3, **rule} for i, rule in enumerate(rules)]
    positions = [i + 3 for i in range(len(rules))]
    rows = [
        sampler.SamplingRow(Sampling(**s), [], position=p)
        for s, p in zip(samplings, positions, strict=True)
    ]
    expected = sampler.sample(logits, rows, [])
    found = draw(logits.to(device), samplings, positions).cpu()
    # exp() differs in the last bit between devices, and with it where a draw at an edge falls.
    wrong = (found != expected).sum()
    assert wrong <= (0 if device.type == "cpu" else len(rules) // 50)


@pytest.mark.parametrize(
    "rule", [{"top_k": 5}, {"top_p": 0.4}, {"top_k": 30, "min_p": 0.5}], ids=str
)
def test_filters_cut_through_equals(
    rule: dict[str, float], sampler: ModuleType, device: torch.device
) -> None:
    """Tokens as probable as the last one kept are kept from the lowest up, and no more."""
    from crosspool.transport.messages import Sampling

    logits = torch.randint(0, 2, (4, 40)).float()
    samplings = [{"seed": i, **rule} for i in range(4)]
    rows = [sampler.SamplingRow(Sampling(**s), [], position=2) for s in samplings]
    expected = sampler.sample(logits, rows, []).tolist()
    assert draw(logits.to(device), samplings, [2] * 4).tolist() == expected


def test_barred_tokens_are_never_drawn(device: torch.device) -> None:
    logits = torch.full((4, 100), -math.inf, device=device)
    logits[:, [20, 60]] = 1.0
    samplings = [{"seed": i, "top_k": (-1, 50)[i % 2]} for i in range(4)]
    expected = [20 if host_uniform(i, 5) < 0.5 else 60 for i in range(4)]
    assert set(expected) == {20, 60}
    assert draw(logits, samplings, [5] * 4).tolist() == expected


def test_a_row_without_numbers_ends_at_the_last_token(device: torch.device) -> None:
    logits = torch.full((2, 100), math.nan, device=device)
    samplings = [{"seed": 1}, {"seed": 1, "top_k": 5}]
    assert draw(logits, samplings, [5, 5]).tolist() == [99, 99]
