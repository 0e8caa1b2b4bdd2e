"""Padded products against float64."""

from __future__ import annotations

import pytest
import torch
from crosspool.kernels.linear import bmm, linear, padded_rows


def test_few_row_counts_none_too_large() -> None:
    counts = [padded_rows(rows) for rows in range(1, 1025)]
    assert len(set(counts)) < 24
    for rows, count in enumerate(counts, start=1):
        assert rows <= count < 1.5 * rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 5, 9, 13, 33, 100])
def test_products_equal_float64(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(3, rows, 24, generator=generator).to(dtype)
    y = torch.randn(3, 24, 16, generator=generator).to(dtype)
    bias = torch.randn(16, generator=generator).to(dtype)
    exact = torch.bmm(x.double(), y.double())
    close = {"atol": tolerance * exact.abs().max().item(), "rtol": 0}
    torch.testing.assert_close(bmm(x, y).double(), exact, **close)
    torch.testing.assert_close(
        linear(x[0], y[0].T, bias).double(), exact[0] + bias.double(), **close
    )
