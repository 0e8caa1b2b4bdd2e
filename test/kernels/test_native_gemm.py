"""Native products against float64, on every ISA path of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from crosspool.kernels import native_structs as ns
from support.native_kernels import NativeKernels
from support.native_operands import PackedMatrix

ROWS = (1, 2, 3, 7, 8, 33, 256)
# (n, k): panels that end inside a group, n inside a panel, k inside a block, odd k.
SHAPES = ((64, 32), (80, 96), (100, 70), (7, 33), (200, 1056), (1, 1))


def _exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.double() @ w.double().T


def _check(found: torch.Tensor, expected: torch.Tensor, k: int, dtype: torch.dtype) -> None:
    """Inputs are about 1 in size, so sums of k products are about sqrt(k). The k roundings of such
    sums, up or down, add up to about 2^-24 k; one result in 10^5 is off by some times as much."""
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(
        found.double(), expected, rtol=rounding, atol=4 * 2**-24 * max(k, 32)
    )


@pytest.mark.parametrize("plain", [False, True], ids=["compact", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(
    native: NativeKernels, dtype: torch.dtype, shape: tuple[int, int], plain: bool
) -> None:
    n, k = shape
    w = torch.randn(n, k).to(dtype)
    packed = native.pack(w, plain=plain)
    assert packed.struct.encoding == (not plain and native.table.compact)
    for rows in ROWS:
        x = torch.randn(rows, k).to(dtype)
        _check(native.gemm(x, packed), _exact(x, w), k, dtype)


def test_bias_index_and_stores(native: NativeKernels, dtype: torch.dtype) -> None:
    n, k, rows = 72, 64, 40
    w, bias = torch.randn(n, k).to(dtype), torch.randn(n)
    packed, x = native.pack(w), torch.randn(50, k).to(dtype)
    index = torch.randperm(50)[:rows].to(torch.int32)
    expected = _exact(x[index], w) + bias.double()

    found = native.gemm(x, packed, bias=bias, index=index)
    _check(found, expected, k, dtype)
    floats = native.gemm(x, packed, bias=bias, index=index, store="float")
    assert torch.equal(floats, found.float())

    residual = torch.randn(rows, n).to(dtype).float()
    summed = native.gemm(x, packed, bias=bias, index=index, store="residual", out=residual.clone())
    assert torch.equal(summed, (residual + floats).to(dtype).float())


def test_only_its_columns_and_elements_are_touched(
    native: NativeKernels, dtype: torch.dtype
) -> None:
    n, k, rows = 40, 35, 9
    w = torch.randn(n, k).to(dtype)
    wide = torch.full((rows, k + 13), math.nan, dtype=dtype)
    wide[:, :k] = torch.randn(rows, k).to(dtype)
    out = torch.full((rows, n + 5), 7.0, dtype=dtype)
    native.gemm(wide[:, :k], native.pack(w), out=out[:, :n])
    _check(out[:, :n], _exact(wide[:, :k], w), k, dtype)
    assert (out[:, n:] == 7.0).all()


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_shares_do_not_change_the_result(
    native: NativeKernels, whole: NativeKernels, dtype: torch.dtype, rows: int
) -> None:
    w, x = torch.randn(272, 320).to(dtype), torch.randn(rows, 320).to(dtype)
    packed = whole.pack(w)
    assert torch.equal(native.pack(w).memory, packed.memory)
    assert torch.equal(native.gemm(x, packed), whole.gemm(x, packed))


def test_a_row_does_not_depend_on_the_others(native: NativeKernels, dtype: torch.dtype) -> None:
    if native.isa == "amx":
        pytest.skip("tiles sum in another order than vectors")
    w, x = torch.randn(96, 256).to(dtype), torch.randn(70, 256).to(dtype)
    packed = native.pack(w)
    together = native.gemm(x, packed, store="float")
    for row in (0, 5, 69):
        assert torch.equal(native.gemm(x[row : row + 1], packed, store="float")[0], together[row])


def test_sources_follow_one_another(native: NativeKernels, dtype: torch.dtype) -> None:
    """q, k and v share a matrix; their borders lie inside panels."""
    parts = [torch.randn(n, 50).to(dtype) for n in (24, 5, 19)]
    x = torch.randn(6, 50).to(dtype)
    packed = native.pack(*parts)
    assert torch.equal(packed.memory, native.pack(torch.cat(parts)).memory)
    _check(native.gemm(x, packed), _exact(x, torch.cat(parts)), 50, dtype)


def test_a_transposed_source(native: NativeKernels, dtype: torch.dtype) -> None:
    """The up-projection of MLA's keys is packed transposed."""
    w = torch.randn(30, 45).to(dtype)
    assert torch.equal(native.pack(w.T).memory, native.pack(w.T.contiguous()).memory)


def test_gated_pairs_alternate(native: NativeKernels, dtype: torch.dtype) -> None:
    gate, up = torch.randn(40, 32).to(dtype), torch.randn(40, 32).to(dtype)
    x = torch.randn(3, 32).to(dtype)
    y = native.gemm(x, native.pack_gated(gate, up)).unflatten(1, (-1, 2, 16))
    for found, w in zip((y[:, :, 0], y[:, :, 1]), (gate, up), strict=True):
        padded = torch.cat((w, torch.zeros(24, 32, dtype=dtype)))
        _check(found.flatten(1), _exact(x, padded), 32, dtype)


def test_embedding_rows(native: NativeKernels, dtype: torch.dtype) -> None:
    table = torch.randn(50, 33).to(dtype)
    ids = torch.tensor([49, 0, 17, 17], dtype=torch.int32)
    for held in (table, native.pack(table)):
        assert isinstance(held, torch.Tensor | PackedMatrix)
        assert torch.equal(native.embed(held, ids), table[ids].float())


def test_no_rows(native: NativeKernels, dtype: torch.dtype) -> None:
    packed = native.pack(torch.randn(32, 32).to(dtype))
    assert native.gemm(torch.empty(0, 32, dtype=dtype), packed).shape == (0, 32)


def _with_odd_ones(n: int, k: int) -> torch.Tensor:
    """Random weights, some of them far outside the range of the others."""
    w = torch.randn(n, k).bfloat16()
    w[torch.rand(n, k) < 0.05] = 0.0
    for at, value in enumerate((1e30, -1e-30, 3e-9, -7e8, 1e-39)):
        w[(5 * at) % n, (37 * at) % k] = value
    w[-1, -1] = -2e-12
    return w


def test_compact_weights_are_the_same_weights(native: NativeKernels, dtype: torch.dtype) -> None:
    if not native.table.compact:
        pytest.skip("this path reads plain weights only")
    for n, k in ((50, 33), (80, 96), (48, 1056)):
        w = _with_odd_ones(n, k)
        packed, plain = native.pack(w), native.pack(w, plain=True)
        assert packed.struct.encoding == ns.COMPACT
        assert packed.struct.bytes < (0.8 if k > 1000 else 1.5) * plain.struct.bytes
        ids = torch.arange(n, dtype=torch.int32)
        assert torch.equal(native.embed(packed, ids), w.float())
        # Each product is one weight. Kernels flush numbers below the normal ones to zero.
        for rows in (min(k, 12), k):
            y = native.gemm(torch.eye(k, dtype=dtype)[:rows], packed, store="float")
            expected = w[:, :rows].float().T
            expected[expected.abs() < 2**-126] = 0.0
            assert torch.equal(y, expected), (n, k, rows)


def test_compact_products_are_plain_products(native: NativeKernels, dtype: torch.dtype) -> None:
    """Without exceptions, which are added last, the products are equal bit for bit."""
    if not native.table.compact:
        pytest.skip("this path reads plain weights only")
    w = (torch.rand(272, 1000) + 0.01).to(dtype) * torch.randn(272, 1000).sign().to(dtype)
    packed, plain = native.pack(w), native.pack(w, plain=True)
    for rows in (1, 2, 6, 12, 13, 33, 200):
        x = torch.randn(rows, 1000).to(dtype)
        assert torch.equal(native.gemm(x, packed), native.gemm(x, plain))


def test_weights_of_any_bits(native: NativeKernels, dtype: torch.dtype) -> None:
    """A matrix with too many exceptions is packed plain."""
    w = torch.randint(-(2**15), 2**15, (64, 256), dtype=torch.int16).view(torch.bfloat16)
    w = torch.where(w.isfinite(), w, torch.ones_like(w)).to(dtype)
    packed = native.pack(w)
    assert packed.struct.encoding == ns.PLAIN
    assert torch.equal(native.embed(packed, torch.arange(64, dtype=torch.int32)), w.float())
