"""Native norms, rotations and KV appends against the host loop's, which they follow to the bit."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from crosspool.kernels.norm import layer_norm, rms_norm
from crosspool.kernels.rope import query_factors, rope_tables, rotate
from support.native_kernels import NativeKernels
from support.native_operands import RopeTables, RowPlaces

PAGES, LAYERS, PAGE_SIZE, LAYER = 6, 2, 4, 1


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equality; only the order of a sum of squares may move values over a rounding border."""
    assert found.dtype == expected.dtype
    bf16 = found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7 if bf16 else 1e-6, atol=1e-6)
    if bf16:
        assert (found != expected).float().mean() < 0.01


def _places(rows: int) -> RowPlaces:
    """Distinct slots at positions that are not in order."""
    slots = torch.randperm(PAGES * PAGE_SIZE)[:rows].to(torch.int32)
    positions = torch.randint(0, 90, (rows,), dtype=torch.int32)
    return RowPlaces(positions, slots // PAGE_SIZE, slots % PAGE_SIZE)


def _tables(dim: int, dtype: torch.dtype, interleaved: bool, fp32: bool) -> RopeTables:
    frequencies = 1.0 / 100.0 ** (torch.arange(0, dim, 2).float() / dim)
    cos, sin = rope_tables(torch.arange(90), frequencies, 1.1)
    if not fp32:
        cos, sin = cos.to(dtype).float(), sin.to(dtype).float()
    return RopeTables(cos, sin, interleaved, fp32)


def _rotated(x: torch.Tensor, places: RowPlaces, tables: RopeTables) -> torch.Tensor:
    """Rotates the first features of ``x`` [T, heads, dim] with the host loop's kernel, as many as
    the tables have."""
    cos, sin = tables.cos[places.positions], tables.sin[places.positions]
    if not tables.fp32:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    dim = 2 * cos.shape[1]
    return torch.cat((rotate(x[..., :dim], cos, sin, tables.interleaved), x[..., dim:]), dim=-1)


def _values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random floats of the model's precision."""
    return torch.randn(shape).to(dtype).float()


@pytest.mark.parametrize("n", [1, 16, 100, 1024])
def test_rms_norm(native: NativeKernels, dtype: torch.dtype, n: int) -> None:
    x, weight = _values(dtype, 5, n), _values(dtype, n)
    found = native.rms_norm(x, weight, 1e-6)
    _close(found, rms_norm(x.to(dtype), weight.to(dtype), 1e-6))


@pytest.mark.parametrize("n", [1, 16, 100, 1024])
def test_layer_norm(native: NativeKernels, dtype: torch.dtype, n: int) -> None:
    """The rows have means of several times their spread, which leaves less digits of the rest."""
    x, weight, bias = _values(dtype, 5, n) + 4.0, _values(dtype, n), _values(dtype, n)
    x = x.to(dtype).float()
    found = native.layer_norm(x, weight, bias, 1e-5)
    expected = layer_norm(x.to(dtype), weight.to(dtype), bias.to(dtype), 1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    else:
        _close(found, expected)


def test_residual_sums(native: NativeKernels, dtype: torch.dtype) -> None:
    residual, x = _values(dtype, 4, 77), torch.randn(4, 77)
    expected = (residual.to(dtype) + x.to(dtype)).float()
    for addend in (x, x.to(dtype)):
        found = residual.clone()
        native.add(found, addend)
        assert torch.equal(found, expected)


def test_factors(native: NativeKernels, dtype: torch.dtype) -> None:
    x = _values(dtype, 4, 77)
    assert torch.equal(native.scale(x.clone(), 0.37), (x.to(dtype) * 0.37).float())


def test_conversions(native: NativeKernels, dtype: torch.dtype) -> None:
    """Rounding follows torch: to nearest, ties to even; NaN and infinity stay."""
    x = torch.cat((torch.randn(1000), torch.tensor([math.inf, -math.inf, 1.00390625, 1.01171875])))
    assert torch.equal(native.round(x), x.to(dtype))
    assert torch.equal(native.convert(x.to(dtype)), x.to(dtype).float())
    assert native.round(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(native: NativeKernels, dtype: torch.dtype, interleaved: bool, fp32: bool) -> None:
    for dim in (6, 64):
        x, places = torch.randn(7, 3, dim).to(dtype), _places(7)
        tables = _tables(dim, dtype, interleaved, fp32)
        assert torch.equal(native.rotate(x, places, tables), _rotated(x, places, tables))


@pytest.mark.parametrize(
    "rotation",
    [(False, 10, 10), (True, 10, 10), (False, 10, 4), (True, 10, 6), (False, 40, 20)],
    ids=lambda r: f"{'interleaved' if r[0] else 'halves'}-{r[2]}-of-{r[1]}",
)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full", "rotated head"])
def test_gqa_prepare(
    native: NativeKernels,
    dtype: torch.dtype,
    qk_norm: Literal["none", "head", "full", "rotated head"],
    clip: float | None,
    rotation: tuple[bool, int, int],
) -> None:
    interleaved, dim, rotated = rotation
    rows, q_heads, kv_heads = 9, 6, 3
    qkv = _values(dtype, rows, (q_heads + 2 * kv_heads) * dim)
    places, tables = _places(rows), _tables(rotated, dtype, interleaved, False)
    q, k, v = qkv.to(dtype).split([q_heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    norms = []
    for projected in (q, k):
        norms.append(_values(dtype, projected.shape[1] if qk_norm == "full" else dim))
    if qk_norm in ("head", "full"):
        q, k = (
            rms_norm(x.unflatten(1, (-1, len(w))), w.to(dtype), 1e-5).flatten(1)
            for x, w in zip((q, k), norms, strict=True)
        )
    if clip is not None:
        q, k, v = (x.clamp(-clip, clip) for x in (q, k, v))
    expected_q = _rotated(q.unflatten(1, (-1, dim)), places, tables).flatten(1)
    expected_k = _rotated(k.unflatten(1, (-1, dim)), places, tables).flatten(1)
    if qk_norm == "rotated head":
        expected_q, expected_k = (
            rms_norm(x.unflatten(1, (-1, dim)), w.to(dtype), 1e-5).flatten(1)
            for x, w in zip((expected_q, expected_k), norms, strict=True)
        )

    kv = torch.full((PAGES, LAYERS, PAGE_SIZE, 2 * kv_heads * dim), math.nan, dtype=dtype)
    found = native.gqa_prepare(
        qkv,
        kv,
        LAYER,
        places=places,
        rope=tables,
        q_heads=q_heads,
        kv_heads=kv_heads,
        qk_norm=qk_norm,
        q_norm=None if qk_norm == "none" else norms[0],
        k_norm=None if qk_norm == "none" else norms[1],
        eps=1e-5,
        clip=clip,
    )
    _close(found, expected_q)
    slots = (places.pages.long(), torch.full((rows,), LAYER), places.offsets.long())
    _close(kv[slots], torch.cat((expected_k, v), dim=1))
    kv[slots] = math.nan
    assert kv.isnan().all(), "a slot of another row or layer was written"


def test_llama4_heads(native: NativeKernels, dtype: torch.dtype) -> None:
    """Rotated heads are normed without weights; those of a layer without rotations have factors on
    q that grow with the position."""
    rows, dim, q_heads, kv_heads = 9, 16, 4, 2
    qkv, places = _values(dtype, rows, (q_heads + 2 * kv_heads) * dim), _places(rows)
    rotated = _tables(dim, dtype, True, True)
    plain = RopeTables(torch.empty(90, 0), torch.empty(90, 0), True, True)
    kv = torch.full((PAGES, LAYERS, PAGE_SIZE, 2 * kv_heads * dim), math.nan, dtype=dtype)
    heads = {"places": places, "q_heads": q_heads, "kv_heads": kv_heads, "eps": 1e-5}
    q = qkv[:, : q_heads * dim].to(dtype).unflatten(1, (-1, dim))
    found = native.gqa_prepare(
        qkv,
        kv,
        LAYER,
        rope=rotated,
        qk_norm="unweighted rotated head",
        **heads,  # type: ignore[arg-type]
    )
    _close(found, rms_norm(_rotated(q, places, rotated), None, 1e-5).flatten(1))
    factors = query_factors(torch.arange(90), 0.3, 8)
    found = native.gqa_prepare(
        qkv,
        kv,
        LAYER,
        rope=plain,
        factors=factors,
        **heads,  # type: ignore[arg-type]
    )
    expected = (q * factors[places.positions.long()][:, None, None]).to(dtype)
    assert factors.unique().numel() > 5
    assert torch.equal(found, expected.flatten(1))
    keys = qkv[:, q_heads * dim :].to(dtype)
    assert torch.equal(kv[places.pages.long(), LAYER, places.offsets.long()], keys)


def test_mla_append(native: NativeKernels, dtype: torch.dtype) -> None:
    rows, latent, dim = 5, 40, 6
    compressed, norm = _values(dtype, rows, latent + dim), _values(dtype, latent)
    places, tables = _places(rows), _tables(dim, dtype, True, True)
    kv = torch.full((PAGES, LAYERS, PAGE_SIZE, latent + dim), math.nan, dtype=dtype)
    native.mla_append(compressed, norm, kv, LAYER, places=places, rope=tables, eps=1e-6)
    latents, keys = compressed.to(dtype).split([latent, dim], dim=1)
    slots = (places.pages.long(), torch.full((rows,), LAYER), places.offsets.long())
    written = kv[slots]
    _close(written[:, :latent], rms_norm(latents, norm.to(dtype), 1e-6))
    assert torch.equal(written[:, latent:], _rotated(keys[:, None], places, tables)[:, 0])
    kv[slots] = math.nan
    assert kv.isnan().all()


def test_q_heads_with_gates_behind_them(native: NativeKernels, dtype: torch.dtype) -> None:
    rows, q_heads, kv_heads, dim = 5, 4, 2, 16
    q, gate = _values(dtype, 2, rows, q_heads, dim)
    keys_values = _values(dtype, rows, 2 * kv_heads * dim)
    norms = _values(dtype, 2, dim)
    places, tables = _places(rows), _tables(8, dtype, False, False)
    results = []
    for gated in (False, True):
        heads = torch.cat((q, gate), dim=2) if gated else q
        kv = torch.zeros(PAGES, LAYERS, PAGE_SIZE, 2 * kv_heads * dim, dtype=dtype)
        found = native.gqa_prepare(
            torch.cat((heads.flatten(1), keys_values), dim=1),
            kv,
            LAYER,
            places=places,
            rope=tables,
            q_heads=q_heads,
            kv_heads=kv_heads,
            qk_norm="head",
            q_norm=norms[0],
            k_norm=norms[1],
            eps=1e-6,
            gated=gated,
        )
        results.append((found, kv))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
