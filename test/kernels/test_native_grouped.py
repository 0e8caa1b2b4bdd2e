"""Products with quantised weights against float64, on every ISA path of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from support.native_kernels import NativeKernels
from support.native_operands import GroupedMatrix
from torch import Tensor

ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 33, 70)
# (n, k, group): n inside a panel, panels that end inside a group of four, k inside a block of
# depths, odd k with one group for all of it.
SHAPES = ((64, 64, 32), (16, 96, 16), (100, 256, 128), (7, 33, 40), (200, 1056, 1056))
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
TABLES = {
    "int4": torch.arange(16, dtype=torch.float64) - 8,
    "uint4": torch.arange(16, dtype=torch.float64),
    "e2m1": torch.cat((_E2M1, -_E2M1)),
    "int8": torch.cat((torch.arange(128), torch.arange(-128, 0))).double(),
    "int6": torch.arange(64, dtype=torch.float64) - 32,
    "uint6": torch.arange(64, dtype=torch.float64),
    "e4m3": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double(),
}
FEW = 12
"""Rows up to which no weight is rounded."""
INTEGERS = frozenset(TABLES) - {"e4m3"}
"""Codes that some paths multiply as integers, by rows of bfloat16 in fixed point."""
INTEGER_PATHS = ("avx2", "neon", "neon_bf16")
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def _weights(
    native: NativeKernels,
    kind: str,
    shape: tuple[int, int, int],
    scale_dtype: torch.dtype,
    offset: str,
) -> tuple[GroupedMatrix, Tensor]:
    """A random matrix, and the weights that it stands for in float64."""
    n, k, group = shape
    if kind in ("int6", "uint6"):  # whose groups are multiples of 16
        group = -(-group // 16) * 16
    groups = math.ceil(k / group)
    codes = torch.randint(len(TABLES[kind]), (n, k)).to(torch.uint8)
    codes[TABLES[kind][codes.long()].isnan()] = 1
    scales = ((torch.rand(n, groups) + 0.5) / 8).to(scale_dtype)
    offsets = None
    if offset == "zero point":
        offsets = torch.randint(16, (n, groups)).to(scale_dtype)
    elif offset == "minimum":
        offsets = torch.randn(n, groups).to(scale_dtype)
    of = torch.arange(k) // group
    values, scale = TABLES[kind][codes.long()], scales.double()[:, of]
    packed = native.pack_grouped(kind, codes, scales, group, offsets=offsets, offset=offset)
    if offsets is None:
        return packed, values * scale
    taken = offsets.double()[:, of]
    return packed, values * scale - taken * (scale if offset == "zero point" else 1)


def _rounding(native: NativeKernels, x: Tensor, kind: str, group: int) -> Tensor:
    """The most by which elements of rows are rounded: in fixed point, those below 2^-7 of the
    largest of their block of up to 32 by 2^-15 of it, and with integers of 8 bits also the largest
    itself."""
    if native.isa not in INTEGER_PATHS or x.dtype != torch.bfloat16 or kind not in INTEGERS:
        return torch.zeros(x.shape, dtype=torch.float64)
    block = math.gcd(32, -(-group // 16) * 16 if kind in ("int6", "uint6") else group)
    sizes = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % block))
    largest = sizes.unflatten(1, (-1, block)).amax(2).repeat_interleave(block, 1)
    rounded = sizes < largest * 2**-7
    if native.isa != "avx2":
        rounded |= sizes == largest
    return (largest * 2**-15 * rounded)[:, : x.shape[1]]


OFFSETS = ("none", "minimum", "zero point")
FORMS = [
    *(("uint4", scales, offset) for scales in SCALES for offset in OFFSETS),
    *((kind, torch.float16, "none") for kind in TABLES if kind != "uint4"),
    *((kind, torch.float32, "minimum") for kind in TABLES if kind != "uint4"),
]
"""Scales and offsets do not depend on the codes, so not all of them meet."""


@pytest.mark.parametrize(("kind", "scale_dtype", "offset"), FORMS, ids=str)
def test_product(
    native: NativeKernels,
    dtype: torch.dtype,
    kind: str,
    scale_dtype: torch.dtype,
    offset: str,
) -> None:
    """Few rows are multiplied with exact weights, more rows with weights that are rounded to the
    model's dtype."""
    half = 2**-8 if dtype == torch.bfloat16 else 0.0
    for shape in SHAPES:
        packed, weights = _weights(native, kind, shape, scale_dtype, offset)
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).to(dtype)
            exact = x.double() @ weights.T
            size = x.double().abs() @ (weights.abs() + 2).T  # offsets cancel what is summed
            bound = 1e-6 * size + half * exact.abs() + (half * size if rows > FEW else 0)
            bound += _rounding(native, x, kind, shape[2]) @ (weights.abs() + 2).T
            assert ((native.gemm(x, packed).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", TABLES)
def test_few_rows_have_exact_weights(native: NativeKernels, dtype: torch.dtype, kind: str) -> None:
    """A row that picks one column of the weights finds all codes as they are."""
    table = TABLES[kind]
    codes = torch.arange(len(table)).to(torch.uint8)[:, None].repeat(1, 128)
    codes[table[codes.long()].isnan()] = 0
    scales = torch.rand(len(table), 4) + 0.5
    packed = native.pack_grouped(kind, codes, scales, 32)
    for column in (0, 6, 77):
        x = torch.zeros(1, 128, dtype=dtype)
        x[0, column] = 1.0
        expected = table[codes[:, column].long()].float() * scales[:, column // 32]
        assert torch.equal(native.gemm(x, packed), expected.to(dtype)[None])


@pytest.mark.parametrize("kind", ["int4", "e2m1", "int8", "int6"])
def test_rows_of_many_sizes(native: NativeKernels, dtype: torch.dtype, kind: str) -> None:
    """Blocks of a row, and the elements of one, may differ by many powers of two."""
    packed, weights = _weights(native, kind, (48, 256, 32), torch.float16, "none")
    of_blocks = torch.exp2(torch.randint(-60, 60, (9, 8)).float()).repeat_interleave(32, 1)
    x = (torch.randn(9, 256) * of_blocks * torch.exp2(-12 * torch.rand(9, 256))).to(dtype)
    x[4] = 0
    exact = x.double() @ weights.T
    bound = 1e-6 * x.double().abs() @ weights.abs().T + _rounding(native, x, kind, 32) @ (
        weights.abs().T
    )
    bound += (2**-8 if dtype == torch.bfloat16 else 0) * exact.abs()
    assert ((native.gemm(x, packed).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["uint4", "int8", "e4m3"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_hidden(
    native: NativeKernels, dtype: torch.dtype, kind: str, value: float
) -> None:
    packed, _ = _weights(native, kind, (48, 64, 32), torch.float16, "none")
    x = torch.randn(3, 64).to(dtype)
    x[1, 40] = value
    found = native.gemm(x, packed).isfinite()
    assert found[[0, 2]].all()
    assert not found[1].any()


@pytest.mark.parametrize("kind", ["uint4", "e4m3"])
def test_shares_and_other_rows_do_not_change_the_result(
    native: NativeKernels, whole: NativeKernels, dtype: torch.dtype, kind: str
) -> None:
    packed, _ = _weights(whole, kind, (272, 320, 32), torch.float16, "minimum")
    x = torch.randn(12, 320).to(dtype)
    together = native.gemm(x, packed)
    assert torch.equal(together, whole.gemm(x, packed))
    for row in (0, 5, 6, 11):
        assert torch.equal(native.gemm(x[row : row + 1], packed)[0], together[row])


def test_rows_by_an_index(native: NativeKernels, dtype: torch.dtype) -> None:
    packed, _ = _weights(native, "e2m1", (48, 64, 32), torch.bfloat16, "none")
    x, index = torch.randn(20, 64).to(dtype), torch.tensor([3, 19, 0], dtype=torch.int32)
    assert torch.equal(native.gemm(x, packed, index=index), native.gemm(x[index], packed))


def test_bytes(native: NativeKernels) -> None:
    """4.5 bits a weight in groups of 32, 8 in whole rows."""
    assert 8 * _weights(native, "int4", (64, 1024, 32), torch.float16, "none")[0].struct.bytes == (
        4.5 * 64 * 1024
    )
    whole = _weights(native, "int8", (64, 1024, 1024), torch.float16, "none")[0].struct.bytes
    assert whole == 64 * 1024 + 4 * 64
