"""Embedding rows, RMSNorm and residual sums."""

from __future__ import annotations

import pytest
import torch
from crosspool.kernels.triton import norm
from crosspool.kernels.triton.tables import TensorTable
from support.device_kernels import assert_close, int32, poisoned, random, rms_norm

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = [
    (4, 3, 128),
    (5, 5, 96),
    pytest.param(4, 3, 2048, marks=pytest.mark.gpu),
    pytest.param(64, 61, 7168, marks=pytest.mark.gpu),
]
EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bucket, rows, width", SHAPES)
def test_norms(
    bucket: int, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    weights = [random(width, dtype=dtype, device=device) for _ in range(3)]
    table, layer, count = TensorTable.of(weights), int32([2], device), int32([rows], device)
    x = random(bucket, width, dtype=dtype, device=device)
    out = poisoned(bucket, width, dtype=dtype, device=device)
    norm.rms_norm(x, table, layer, count, out, eps=EPS)
    assert_close(out[:rows], rms_norm(x[:rows], weights[2], EPS), dtype)
    assert out[rows:].isnan().all()


@pytest.mark.parametrize("addend_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bucket, rows, width", SHAPES)
def test_residual_sums(
    bucket: int, rows: int, width: int, addend_dtype: torch.dtype, device: torch.device
) -> None:
    dtype = torch.bfloat16
    weights = [random(width, dtype=dtype, device=device) for _ in range(2)]
    layer, count = int32([1], device), int32([rows], device)
    residual = random(bucket, width, dtype=dtype, device=device)
    addend = random(bucket, width, dtype=addend_dtype, device=device)
    before, expected = residual.clone(), (residual.float() + addend.float()).to(dtype)
    out = poisoned(bucket, width, dtype=dtype, device=device)
    table = TensorTable.of(weights)
    norm.rms_norm(residual, table, layer, count, out, eps=EPS, addend=addend)
    assert torch.equal(residual[:rows], expected[:rows])
    assert torch.equal(residual[rows:], before[rows:])
    assert_close(out[:rows], rms_norm(expected[:rows], weights[1], EPS), dtype)
    assert out[rows:].isnan().all()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_embedding_rows(out_dtype: torch.dtype, device: torch.device) -> None:
    table = random(50, 1100, dtype=torch.bfloat16, device=device)
    tokens = int32([49, 0, 7, 2**30], device)
    out = poisoned(4, 1100, dtype=out_dtype, device=device)
    norm.embed(table, tokens, int32([3], device), out)
    assert torch.equal(out[:3], table[[49, 0, 7]].to(out_dtype))
    assert out[3].isnan().all()


def test_tables_refuse_what_kernels_cannot_read() -> None:
    with pytest.raises(ValueError, match="at least one"):
        TensorTable.of([None])
    with pytest.raises(ValueError, match="differ"):
        TensorTable.of([torch.ones(4), torch.ones(8)])
    with pytest.raises(ValueError, match="contiguous"):
        TensorTable.of([torch.ones(8, 8).T])
    with pytest.raises(ValueError, match="aligned"):
        TensorTable.of([torch.ones(9)[1:]])
    table = TensorTable.of_stacks([None, torch.ones(3, 4)])
    assert table.shape == (4,)
    assert table.pointers[0].tolist() == [0, 0, 0]
    assert table.pointers[1].diff().tolist() == [16, 16]
