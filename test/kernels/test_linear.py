"""Products in blocks of rows against float64, and the same rows in batches of other sizes."""

from __future__ import annotations

import pytest
import torch
from crosspool.kernels.linear import bmm, linear

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 33, 100])
def test_products_equal_float64(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    x, y, bias = (random(*shape, dtype=dtype) for shape in ((3, rows, 24), (3, 24, 16), (16,)))
    exact = torch.bmm(x.double(), y.double())
    close = {"atol": tolerance * exact.abs().max().item(), "rtol": 0}
    torch.testing.assert_close(bmm(x, y).double(), exact, **close)
    torch.testing.assert_close(
        linear(x[0], y[0].T, bias).double(), exact[0] + bias.double(), **close
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), [(24, 40), (100, 37), (256, 128), (1024, 640)])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(
    dtype: torch.dtype, width: int, out: int
) -> None:
    x, weight = random(70, width, dtype=dtype), random(out, width, dtype=dtype)
    heads, up = random(70, 3, width, dtype=dtype).transpose(0, 1), random(3, width, 8, dtype=dtype)
    whole, of_heads = linear(x, weight), bmm(heads, up)
    for first, rows in ((0, 1), (7, 1), (69, 1), (3, 5), (11, 16), (1, 30), (20, 50)):
        some = slice(first, first + rows)
        assert torch.equal(linear(x[some], weight), whole[some])
        assert torch.equal(bmm(heads[:, some], up), of_heads[:, some])
