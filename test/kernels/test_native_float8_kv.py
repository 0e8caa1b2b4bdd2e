"""Floats of 8 bits in a KV cache: how native kernels round them when they write rows of K and V,
and what they read again. Torch's conversions are the reference."""

from __future__ import annotations

import math

import pytest
import torch
from crosspool.kernels.attention import RowSpan
from crosspool.kernels.norm import rms_norm
from support.native_kernels import NativeKernels
from support.native_operands import RopeTables, RowPlaces
from torch import Tensor

PAGE_SIZE, LAYERS, LAYER = 4, 2, 1
HEAD_DIM = 10


def _rounded(values: Tensor, float8: torch.dtype) -> Tensor:
    largest = torch.finfo(float8).max
    return values.clamp(-largest, largest).to(float8)


def _assert_same(found: Tensor, expected: Tensor) -> None:
    """Compares floats of 8 bits, signs of zeros included; NaN has no sign."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.float().isnan(), expected.float().isnan())
    numbers = ~expected.float().isnan()
    assert torch.equal(found.view(torch.uint8)[numbers], expected.view(torch.uint8)[numbers])


def _finite(float8: torch.dtype) -> Tensor:
    """Every finite number of a format, ascending, float32."""
    codes = torch.arange(256, dtype=torch.uint8).view(float8).float()
    return codes[codes.isfinite()].unique()


def _hard_values(dtype: torch.dtype, float8: torch.dtype) -> Tensor:
    """Values at which rounding turns over, of the model's precision: every number that a format
    has, the middles between neighbours, what lies beside both, and what has no place in it."""
    numbers = _finite(float8)
    exact = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2))
    beside = [torch.nextafter(exact, torch.tensor(side * math.inf)) for side in (-1.0, 1.0)]
    odd = [math.inf, -math.inf, math.nan, 0.0, -0.0, 449.0, 480.0, 6e4, -1e5, 3e38, 1e-30, -1e-40]
    drawn = torch.randn(4000) * torch.logspace(-8, 5, 4000)
    if dtype == torch.bfloat16:
        every = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16).float()
        beside.append(every)
    return torch.cat((exact, *beside, torch.tensor(odd), drawn)).to(dtype).float()


def _tables(dtype: torch.dtype) -> RopeTables:
    angles = torch.arange(64)[:, None] * torch.tensor([[1.0, 0.5, 0.2, 0.1, 0.03]])
    return RopeTables(angles.cos().to(dtype).float(), angles.sin().to(dtype).float())


def _places(rows: int) -> tuple[RowPlaces, Tensor, Tensor]:
    slots = torch.arange(rows, dtype=torch.int32)
    pages, offsets = slots // PAGE_SIZE, slots % PAGE_SIZE
    return RowPlaces(slots % 64, pages, offsets), pages.long(), offsets.long()


@pytest.mark.parametrize("flush", [False, True], ids=["subnormals", "zeros for subnormals"])
def test_values_are_rounded_as_torch_rounds_them(
    native: NativeKernels, dtype: torch.dtype, float8: torch.dtype, flush: bool
) -> None:
    """``flush``: whether numbers too small for float32 count as zero, as in a team's threads."""
    values = _hard_values(dtype, float8)
    values = values[: len(values) // HEAD_DIM * HEAD_DIM].view(-1, HEAD_DIM)
    expected = _rounded(values.to(dtype), float8)
    rows = len(values)
    kv = torch.empty(-(-rows // PAGE_SIZE), LAYERS, PAGE_SIZE, 2 * HEAD_DIM, dtype=float8)
    places, pages, offsets = _places(rows)
    qkv = torch.cat((torch.zeros(rows, 2 * HEAD_DIM), values), dim=1)
    torch.set_flush_denormal(flush)
    try:
        native.gqa_prepare(
            qkv,
            kv,
            LAYER,
            places=places,
            rope=_tables(dtype),
            q_heads=1,
            kv_heads=1,
            qk_norm="none",
            q_norm=None,
            k_norm=None,
            eps=1e-6,
            clip=None,
        )
    finally:
        torch.set_flush_denormal(False)
    _assert_same(kv[pages, LAYER, offsets][:, HEAD_DIM:], expected)


def test_rotated_keys_are_rounded_to_the_models_dtype_first(
    native: NativeKernels, dtype: torch.dtype, float8: torch.dtype
) -> None:
    """What a cache of the model's dtype holds is what the other one rounds."""
    rows = 32
    places, pages, offsets = _places(rows)
    caches = {}
    for held in (dtype, float8):
        kv = torch.zeros(rows // PAGE_SIZE, LAYERS, PAGE_SIZE, 4 * HEAD_DIM, dtype=held)
        torch.manual_seed(1)
        native.gqa_prepare(
            (torch.randn(rows, 8 * HEAD_DIM) * 20).to(dtype).float(),
            kv,
            LAYER,
            places=places,
            rope=_tables(dtype),
            q_heads=4,
            kv_heads=2,
            qk_norm="head",
            q_norm=torch.ones(HEAD_DIM),
            k_norm=torch.linspace(0.1, 900, HEAD_DIM).to(dtype).float(),
            eps=1e-6,
            clip=None,
        )
        assert not kv[:, 1 - LAYER].float().any(), "a slot of another layer was written"
        caches[held] = kv[pages, LAYER, offsets]
    assert caches[dtype].abs().max() > 448
    _assert_same(caches[float8], _rounded(caches[dtype], float8))


def test_latents_and_rope_keys_are_rounded(
    native: NativeKernels, dtype: torch.dtype, float8: torch.dtype
) -> None:
    rows, latent = 9, 40
    places, pages, offsets = _places(rows)
    compressed = torch.randn(rows, latent + HEAD_DIM).to(dtype).float()
    norm = torch.randn(latent).to(dtype).float()
    caches = {}
    for held in (dtype, float8):
        kv = torch.zeros(3, LAYERS, PAGE_SIZE, latent + HEAD_DIM, dtype=held)
        arguments = {"places": places, "rope": _tables(dtype), "eps": 1e-6}
        native.mla_append(compressed, norm, kv, LAYER, **arguments)  # type: ignore[arg-type]
        caches[held] = kv[pages, LAYER, offsets]
    expected = rms_norm(compressed[:, :latent].to(dtype), norm.to(dtype), 1e-6)
    torch.testing.assert_close(caches[dtype][:, :latent], expected, rtol=2**-7, atol=1e-6)
    _assert_same(caches[float8], _rounded(caches[dtype], float8))


@pytest.mark.parametrize("width", [7, 16, 32, 48, 64, 75])
def test_every_number_is_read_as_what_it_stands_for(
    native: NativeKernels, dtype: torch.dtype, float8: torch.dtype, width: int
) -> None:
    """A query that sees one key gets that key's value."""
    numbers = _finite(float8).to(float8)
    rows = -(-len(numbers) // width)
    values = torch.zeros(rows * width).to(float8)
    values[: len(numbers)] = numbers
    kv = torch.full((rows, LAYERS, PAGE_SIZE, 2 * width), math.nan, dtype=float8)
    kv[:, LAYER, 0, :width] = torch.randn(rows, width).to(float8)
    kv[:, LAYER, 0, width:] = values.view(rows, width)
    segments = [
        RowSpan(first_row=row, rows=1, start=0, pages=torch.tensor([row])) for row in range(rows)
    ]
    q = torch.randn(rows, 1, width).to(dtype)
    shape = {"kv_heads": 1, "v_dim": width, "v_begin": width, "scale": 0.1}
    found = native.attend(q, kv, LAYER, segments, **shape)  # type: ignore[arg-type]
    assert torch.equal(found.view(-1), values.to(dtype))


@pytest.mark.parametrize("width", [16, 40, 64])
def test_every_number_is_read_in_keys(
    native: NativeKernels, dtype: torch.dtype, float8: torch.dtype, width: int
) -> None:
    """The query picks one feature of the keys, so that scores are the numbers themselves, scaled
    to at most 1; values are ones and zeros, so that the result is a sum of probabilities."""
    numbers = _finite(float8)
    keys = len(numbers)
    for feature in (0, width - 1):
        pages = torch.arange(-(-keys // PAGE_SIZE))
        kv = torch.full((len(pages), LAYERS, PAGE_SIZE, 2 * width), math.nan, dtype=float8)
        at = torch.arange(keys)
        held = torch.zeros(keys, 2 * width)
        held[:, feature] = numbers
        held[:, width] = (at % 3 == 0).float()
        kv[pages[at // PAGE_SIZE], LAYER, at % PAGE_SIZE] = held.to(float8)
        q = torch.zeros(1, 1, width, dtype=dtype)
        q[0, 0, feature] = 1.0
        scale = 4 / float(numbers[-1])
        segment = RowSpan(first_row=0, rows=1, start=keys - 1, pages=pages)
        shape = {"kv_heads": 1, "v_dim": width, "v_begin": width, "scale": scale}
        found = native.attend(q, kv, LAYER, [segment], **shape)  # type: ignore[arg-type]
        weights = (numbers.double() * scale).softmax(dim=0)
        expected = float(weights[at % 3 == 0].sum())
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
        assert float(found[0, 0, 0]) == pytest.approx(expected, rel=tolerance)


def test_nan_stays_nan(native: NativeKernels, dtype: torch.dtype, float8: torch.dtype) -> None:
    """A broken value shows, as it does in a cache of the model's dtype."""
    kv = torch.zeros(1, LAYERS, PAGE_SIZE, 2 * 64).to(float8)
    kv[0, LAYER, 1, 70] = math.nan
    segment = RowSpan(first_row=0, rows=1, start=2, pages=torch.tensor([0]))
    shape = {"kv_heads": 1, "v_dim": 64, "v_begin": 64, "scale": 0.1}
    q = torch.zeros(1, 1, 64, dtype=dtype)
    found = native.attend(q, kv, LAYER, [segment], **shape)  # type: ignore[arg-type]
    assert found[0, 0].isnan().nonzero().tolist() == [[6]]
    kv[0, LAYER, 0, 3] = math.nan
    assert native.attend(q, kv, LAYER, [segment], **shape).isnan().all()  # type: ignore[arg-type]
