"""Products with rows of activations, by way of few rows and of many."""

from __future__ import annotations

import pytest
import torch
from crosspool.kernels.triton.linear import LinearWorkspace, head_logits, linear
from crosspool.kernels.triton.tables import TensorTable
from support.device_kernels import assert_close, int32, poisoned, random, relative_error

BF16, FP32 = torch.bfloat16, torch.float32
gpu = pytest.mark.gpu
SHAPES = [
    # bucket, rows, n, k
    (4, 3, 8, 1024),  # a router: splits K, columns to spare
    (4, 3, 96, 128),
    (32, 29, 80, 128),
    (80, 80, 160, 96),
    pytest.param(1, 1, 5120, 2048, marks=gpu),  # Qwen3-30B-A3B: qkv, o
    pytest.param(4, 3, 2048, 4096, marks=gpu),
    pytest.param(512, 500, 5120, 2048, marks=gpu),
    pytest.param(4, 3, 576, 2048, marks=gpu),  # DeepSeek-V2-Lite: compressed KV, q
    pytest.param(16, 16, 3072, 2048, marks=gpu),
    pytest.param(2, 2, 5120, 768, marks=gpu),  # GLM-4.7-Flash: q from its latent, o
    pytest.param(64, 50, 2048, 5120, marks=gpu),
    pytest.param(4, 4, 64, 2048, marks=gpu),  # its router
]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("bucket, rows, n, k", SHAPES)
def test_products(
    bucket: int, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    weights = [random(n, k, dtype=dtype, device=device, scale=k**-0.5) for _ in range(3)]
    biases = [random(n, dtype=dtype, device=device) for _ in range(3)]
    table, layer, count = TensorTable.of(weights), int32([2], device), int32([rows], device)
    workspace = LinearWorkspace.allocate(device)
    # Rows of a wider array, as a part of a projection is.
    x = random(bucket, k + 16, dtype=BF16, device=device)[:, :k]
    expected = x[:rows].double() @ weights[2].double().T
    for _ in range(2):  # the second finds the workspace as the first left it
        out = poisoned(bucket, n, dtype=dtype, device=device)
        linear(x, table, layer, count, out, workspace)
        assert_close(out[:rows], expected, dtype)
        assert out[rows:].isnan().all()
        assert not workspace.arrivals.any()

    residual = random(bucket, n, dtype=dtype, device=device)
    before = residual.clone()
    linear(x, table, layer, count, residual, workspace, bias=TensorTable.of(biases), add=True)
    assert_close(residual[:rows], before[:rows].double() + expected + biases[2].double(), dtype)
    assert torch.equal(residual[rows:], before[rows:])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    "bucket, rows, hidden, vocab",
    [
        (2, 1, 96, 300),
        pytest.param(1, 1, 2048, 151936, marks=gpu),
        pytest.param(4, 3, 2048, 102400, marks=gpu),
    ],
)
def test_logits_are_rounded_to_the_models_dtype(
    bucket: int, rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> None:
    weight = random(vocab, hidden, dtype=dtype, device=device, scale=hidden**-0.5)
    x = random(bucket, hidden, dtype=dtype, device=device)
    logits = poisoned(bucket, vocab, dtype=FP32, device=device)
    zero, count = int32([0], device), int32([rows], device)
    head_logits(x, TensorTable.of([weight]), zero, count, logits)
    expected = x[:rows].double() @ weight.double().T
    assert_close(logits[:rows], expected, dtype)
    assert torch.equal(logits[:rows], logits[:rows].to(dtype).float())
    assert logits[rows:].isnan().all()


def test_a_float32_router_widens_its_rows(device: torch.device) -> None:
    weight = random(64, 128, dtype=FP32, device=device)
    x = random(3, 128, dtype=BF16, device=device)
    out = poisoned(3, 64, dtype=FP32, device=device)
    one = int32([3], device)
    linear(x, TensorTable.of([weight]), one * 0, one, out, LinearWorkspace.allocate(device))
    assert relative_error(out, x.double() @ weight.double().T) < 1e-6


def test_an_odd_depth_is_refused(device: torch.device) -> None:
    x = random(1, 40, dtype=BF16, device=device)
    table = TensorTable.of([random(16, 40, dtype=BF16, device=device)])
    zero = int32([0], device)
    with pytest.raises(ValueError, match="multiple of 16, not 40"):
        linear(x, table, zero, zero, x, LinearWorkspace.allocate(device))
