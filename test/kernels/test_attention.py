"""Paged attention against a plain float64 softmax over the tokens of each request."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from crosspool.kernels.attention import (
    RowSpan,
    append_kv,
    gather_kv,
    gqa_attention,
    mla_attention,
)
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    start: int,
    window: int | None,
    sink: float = -math.inf,
) -> Array:
    """One head: q [rows, d], k [len, d], v [len, dv]."""
    out = np.zeros((len(q), v.shape[1]))
    for row in range(len(q)):
        last = start + row
        first = 0 if window is None else max(0, last - window + 1)
        scores = k[first : last + 1] @ q[row] * scale
        most = max(scores.max(), sink)
        weights = np.exp(scores - most)
        out[row] = weights / (weights.sum() + np.exp(sink - most)) @ v[first : last + 1]
    return out


# (cached tokens, rows of the batch) of each request; 300 rows span several blocks.
RAGGED = [(0, 5), (11, 1), (3, 300), (16, 4), (0, 1), (40, 1)]
PAGE_SIZE = 8


def _paged(width: int) -> tuple[torch.Tensor, list[RowSpan], list[torch.Tensor]]:
    """Makes a cache of three layers, full of NaN but for every request's tokens in layer 1."""
    generator = torch.Generator().manual_seed(0)
    kv = torch.full((64, 3, PAGE_SIZE, width), math.nan)
    free = torch.randperm(64, generator=generator)
    segments, tokens, row = [], [], 0
    for start, rows in RAGGED:
        length = start + rows
        used = -(-length // PAGE_SIZE)
        pages, free = free[:used], free[used:]
        values = torch.randn(length, width, generator=generator)
        positions = torch.arange(length)
        slots = pages[positions // PAGE_SIZE], positions % PAGE_SIZE
        append_kv(kv, 1, slots, values)
        segments.append(RowSpan(first_row=row, rows=rows, start=start, pages=pages))
        tokens.append(values)
        row += rows
    assert kv[:, [0, 2]].isnan().all()
    return kv, segments, tokens


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 6, 200])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_gqa(window: int | None, q_heads: int, kv_heads: int, has_sinks: bool) -> None:
    head_dim, scale = 16, 0.3
    kv, segments, tokens = _paged(2 * kv_heads * head_dim)
    q = torch.randn(sum(rows for _, rows in RAGGED), q_heads, head_dim)
    sinks = torch.linspace(-2, 4, q_heads) if has_sinks else None
    found = gqa_attention(
        q, kv, 1, segments, kv_heads=kv_heads, scale=scale, window=window, sinks=sinks
    ).numpy()
    for segment, values in zip(segments, tokens, strict=True):
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        k, v = values.double().numpy().reshape(-1, 2, kv_heads, head_dim).swapaxes(0, 1)
        for head in range(q_heads):
            of_kv = head // (q_heads // kv_heads)
            queries = q[rows, head].double().numpy()
            expected = _attend(
                queries,
                k[:, of_kv],
                v[:, of_kv],
                scale=scale,
                start=segment.start,
                window=window,
                sink=-math.inf if sinks is None else float(sinks[head]),
            )
            np.testing.assert_allclose(found[rows, head], expected, atol=2e-5)


def test_mla() -> None:
    heads, latent, rope, scale = 5, 24, 8, 0.2
    kv, segments, tokens = _paged(latent + rope)
    q = torch.randn(sum(rows for _, rows in RAGGED), heads, latent + rope)
    found = mla_attention(q, kv, 1, segments, latent=latent, scale=scale).numpy()
    for segment, values in zip(segments, tokens, strict=True):
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        keys = values.double().numpy()
        for head in range(heads):
            queries = q[rows, head].double().numpy()
            expected = _attend(
                queries, keys, keys[:, :latent], scale=scale, start=segment.start, window=None
            )
            np.testing.assert_allclose(found[rows, head], expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6, 37, 200])
def test_a_row_has_the_same_bits_in_a_chunk_of_any_length(
    dtype: torch.dtype, window: int | None
) -> None:
    """Keys that are not written yet are NaN when a row is computed alone."""
    heads, kv_heads, head_dim = 6, 2, 20
    kv, segments, _ = _paged(2 * kv_heads * head_dim)
    pages, length = segments[2].pages, segments[2].start + segments[2].rows
    kv = kv.to(dtype)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(length, heads, head_dim, generator=generator).to(dtype)
    latent_q = torch.randn(length, heads, kv.shape[3], generator=generator).to(dtype)

    def attended(start: int, rows: int) -> tuple[torch.Tensor, ...]:
        known = kv.clone()
        later = torch.arange(start + rows, len(pages) * PAGE_SIZE)
        known[pages[later // PAGE_SIZE], :, later % PAGE_SIZE] = math.nan
        chunk = [RowSpan(first_row=0, rows=rows, start=start, pages=pages)]
        some = slice(start, start + rows)
        return (
            gqa_attention(q[some], known, 1, chunk, kv_heads=kv_heads, scale=0.3, window=window),
            gqa_attention(
                *(q[some], known, 1, chunk),
                kv_heads=kv_heads,
                scale=0.3,
                window=window,
                sinks=torch.linspace(-1, 2, heads).to(dtype),
            ),
            mla_attention(latent_q[some], known, 1, chunk, latent=24, scale=0.2),
        )

    whole = attended(0, length)
    for start, rows in ((0, 1), (1, 1), (15, 1), (16, 1), (302, 1), (290, 13), (5, 40), (33, 200)):
        for found, expected in zip(attended(start, rows), whole, strict=True):
            assert torch.equal(found, expected[start : start + rows]), (start, rows)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 8), (7, 9), (8, 16), (13, 44)])
def test_gather_takes_exactly_the_asked_tokens(start: int, end: int) -> None:
    kv, segments, tokens = _paged(4)
    found = gather_kv(kv, 1, segments[2].pages, range(start, end), kv.dtype)
    torch.testing.assert_close(found[: end - start], tokens[2][start:end], atol=0, rtol=0)
    assert (start + len(found)) % 16 == 0 and not found[end - start :].any()
