"""Native attention against a plain float64 softmax over the tokens of each request."""

from __future__ import annotations

import math

import pytest
import torch
from crosspool.kernels.attention import RowSpan, append_kv, as_cached, gqa_attention
from support.native_kernels import NativeKernels

# (cached tokens, rows of the batch) of each request. Keys of decode rows fill less than a block,
# several blocks, or are split; prompts make one task or several.
RAGGED = ((0, 5), (11, 1), (3, 150), (16, 4), (0, 1), (40, 1), (700, 1), (300, 2), (63, 1))
PAGE_SIZE, LAYERS, LAYER = 12, 2, 1


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    start: int,
    window: int | None,
    chunked: bool = False,
    sink: float = -math.inf,
) -> torch.Tensor:
    """One head: q [rows, d], k [len, d], v [len, dv], float64."""
    positions = torch.arange(start, start + len(q))[:, None]
    keys = torch.arange(len(k))
    seen = keys <= positions
    if window is not None and chunked:
        seen &= keys // window == positions // window
    elif window is not None:
        seen &= keys > positions - window
    scores = (q @ k.T * scale).masked_fill(~seen, -math.inf)
    scores = torch.cat((scores, torch.full((len(q), 1), sink).to(scores)), dim=1)
    return scores.softmax(dim=1)[:, :-1] @ v


def _paged(
    width: int, dtype: torch.dtype, requests: tuple[tuple[int, int], ...]
) -> tuple[torch.Tensor, list[RowSpan], list[torch.Tensor]]:
    """Makes a cache of a dtype, full of NaN but for every request's tokens in one layer."""
    pages = sum(-(-sum(request) // PAGE_SIZE) for request in requests) + 3
    kv = torch.full((pages, LAYERS, PAGE_SIZE, width), math.nan, dtype=dtype)
    free = torch.randperm(pages)
    segments, tokens, row = [], [], 0
    for start, rows in requests:
        length = start + rows
        used, free = free.tensor_split([-(-length // PAGE_SIZE)])
        values = as_cached(torch.randn(length, width), dtype)
        positions = torch.arange(length)
        append_kv(kv, LAYER, (used[positions // PAGE_SIZE], positions % PAGE_SIZE), values)
        segments.append(RowSpan(first_row=row, rows=rows, start=start, pages=used))
        tokens.append(values)
        row += rows
    return kv, segments, tokens


def _check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Values are about 1 in size; bf16 probabilities are off by up to 2^-9 each."""
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 6, 200])
@pytest.mark.parametrize("heads", [(6, 2, 20), (4, 4, 64), (5, 1, 33)], ids=str)
def test_gqa(
    native: NativeKernels,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    heads: tuple[int, int, int],
    window: int | None,
) -> None:
    q_heads, kv_heads, dim = heads
    kv, segments, tokens = _paged(2 * kv_heads * dim, kv_dtype, RAGGED)
    rows = sum(segment.rows for segment in segments)
    q = torch.randn(rows, q_heads, dim).to(dtype)
    found = native.attend(
        q,
        kv,
        LAYER,
        segments,
        kv_heads=kv_heads,
        v_dim=dim,
        v_begin=kv_heads * dim,
        scale=0.3,
        window=window,
    )
    for segment, values in zip(segments, tokens, strict=True):
        k, v = values.double().view(-1, 2, kv_heads, dim).unbind(1)
        at = slice(segment.first_row, segment.first_row + segment.rows)
        for head in range(q_heads):
            kv_head = head * kv_heads // q_heads
            expected = _reference(
                q[at, head].double(),
                k[:, kv_head],
                v[:, kv_head],
                scale=0.3,
                start=segment.start,
                window=window,
            )
            _check(found[at, head], expected, dtype)


@pytest.mark.parametrize("chunk", [1, 6, 64, 200])
def test_chunks(native: NativeKernels, dtype: torch.dtype, chunk: int) -> None:
    """Chunks that end within blocks of keys and between them, some of them within a prompt."""
    kv, segments, tokens = _paged(2 * 2 * 20, dtype, RAGGED)
    q = torch.randn(sum(segment.rows for segment in segments), 4, 20).to(dtype)
    shape = {"kv_heads": 2, "scale": 0.3, "window": chunk, "chunked": True}
    found = native.attend(q, kv, LAYER, segments, v_dim=20, v_begin=40, **shape)  # type: ignore[arg-type]
    from_host = gqa_attention(q, kv, LAYER, segments, **shape)  # type: ignore[arg-type]
    for segment, values in zip(segments, tokens, strict=True):
        k, v = values.double().view(-1, 2, 2, 20).unbind(1)
        at = slice(segment.first_row, segment.first_row + segment.rows)
        for head in range(4):
            of_head = q[at, head].double(), k[:, head // 2], v[:, head // 2]
            expected = _reference(
                *of_head, scale=0.3, start=segment.start, window=chunk, chunked=True
            )
            _check(found[at, head], expected, dtype)
            _check(from_host[at, head], expected, dtype)


@pytest.mark.parametrize("window", [None, 6, 200])
def test_sinks(native: NativeKernels, dtype: torch.dtype, window: int | None) -> None:
    """A sink far below all scores changes nothing, one far above them leaves nothing."""
    sinks = torch.tensor([0.5, -200.0, 3.0, 150.0])
    kv, segments, tokens = _paged(2 * 2 * 20, dtype, RAGGED)
    q = torch.randn(sum(segment.rows for segment in segments), 4, 20).to(dtype)
    shape = {"kv_heads": 2, "v_dim": 20, "v_begin": 40, "scale": 0.3, "window": window}
    found = native.attend(q, kv, LAYER, segments, sinks=sinks, **shape)  # type: ignore[arg-type]
    plain = native.attend(q, kv, LAYER, segments, **shape)  # type: ignore[arg-type]
    assert torch.equal(found[:, 1], plain[:, 1])
    assert not found[:, 3].any()
    for segment, values in zip(segments, tokens, strict=True):
        k, v = values.double().view(-1, 2, 2, 20).unbind(1)
        at = slice(segment.first_row, segment.first_row + segment.rows)
        for head in range(4):
            expected = _reference(
                q[at, head].double(),
                k[:, head // 2],
                v[:, head // 2],
                scale=0.3,
                start=segment.start,
                window=window,
                sink=float(sinks[head]),
            )
            _check(found[at, head], expected, dtype)


@pytest.mark.parametrize("heads", [3, 100])
def test_mla(native: NativeKernels, dtype: torch.dtype, kv_dtype: torch.dtype, heads: int) -> None:
    latent, rope = 72, 10
    requests = ((0, 30), (5, 1), (400, 1))
    kv, segments, tokens = _paged(latent + rope, kv_dtype, requests)
    q = torch.randn(sum(rows for _, rows in requests), heads, latent + rope).to(dtype)
    found = native.attend(q, kv, LAYER, segments, kv_heads=1, v_dim=latent, v_begin=0, scale=0.11)
    for segment, values in zip(segments, tokens, strict=True):
        at = slice(segment.first_row, segment.first_row + segment.rows)
        k = values.double()
        for head in range(heads):
            expected = _reference(
                q[at, head].double(),
                k,
                k[:, :latent],
                scale=0.11,
                start=segment.start,
                window=None,
            )
            _check(found[at, head], expected, dtype)


def test_shares_do_not_change_the_result(
    native: NativeKernels, whole: NativeKernels, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    kv, segments, _ = _paged(2 * 2 * 16, kv_dtype, RAGGED)
    q = torch.randn(sum(rows for _, rows in RAGGED), 4, 16).to(dtype)
    shape = {"kv_heads": 2, "v_dim": 16, "v_begin": 32, "scale": 0.25}
    one, three = (
        kernels.attend(q, kv, LAYER, segments, **shape)  # type: ignore[arg-type]
        for kernels in (whole, native)
    )
    assert torch.equal(one, three)


def test_a_decode_row_does_not_depend_on_the_others(
    native: NativeKernels, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    kv, segments, _ = _paged(2 * 2 * 16, kv_dtype, RAGGED)
    q = torch.randn(sum(rows for _, rows in RAGGED), 4, 16).to(dtype)
    shape = {"kv_heads": 2, "v_dim": 16, "v_begin": 32, "scale": 0.25}
    together = native.attend(q, kv, LAYER, segments, **shape)  # type: ignore[arg-type]
    for segment in segments:
        if segment.rows > 1:
            continue
        alone = RowSpan(first_row=0, rows=1, start=segment.start, pages=segment.pages)
        row = q[segment.first_row : segment.first_row + 1]
        found = native.attend(row, kv, LAYER, [alone], **shape)  # type: ignore[arg-type]
        assert torch.equal(found[0], together[segment.first_row])


def test_large_scores(native: NativeKernels, dtype: torch.dtype) -> None:
    """Scores far apart: one key takes all, and no exponent overflows."""
    kv, segments, tokens = _paged(2 * 8, dtype, ((300, 1),))
    tokens[0][:, :8] = 0.0
    tokens[0][250, :8], tokens[0][3, :8] = 60.0, -60.0
    positions = torch.arange(301)
    slots = (segments[0].pages[positions // PAGE_SIZE], positions % PAGE_SIZE)
    append_kv(kv, LAYER, slots, tokens[0])
    q = torch.full((1, 1, 8), 60.0, dtype=dtype)
    found = native.attend(q, kv, LAYER, segments, kv_heads=1, v_dim=8, v_begin=8, scale=1.0)
    assert torch.equal(found[0, 0], tokens[0][250, 8:])


@pytest.mark.parametrize("window", [None, 6, 200])
@pytest.mark.parametrize(
    "sizes",
    [
        ((8, 24), 96, {"kv_heads": 2, "v_dim": 24, "v_begin": 48}),
        ((100, 40), 40, {"kv_heads": 1, "v_dim": 32, "v_begin": 0}),
    ],
    ids=["GQA", "MLA"],
)
def test_a_row_comes_out_the_same_in_chunks_of_any_length(
    native: NativeKernels,
    kv_dtype: torch.dtype,
    sizes: tuple[tuple[int, int], int, dict[str, int]],
    window: int | None,
) -> None:
    """A request that is computed again after its rank was lost goes on as it would have."""
    (heads, width, shape), length = sizes, 420
    kv, (whole,), _ = _paged(width, kv_dtype, ((0, length),))
    q, sinks = torch.randn(length, *heads).to(native.dtype), torch.randn(heads[0])

    def attend(chunk: int) -> torch.Tensor:
        parts = []
        for start in range(0, length, chunk):
            rows = q[start : start + chunk]
            segment = RowSpan(first_row=0, rows=len(rows), start=start, pages=whole.pages)
            parts.append(
                native.attend(
                    rows, kv, LAYER, [segment], scale=0.3, window=window, sinks=sinks, **shape
                )
            )
        return torch.cat(parts)

    alone = attend(1)
    for chunk in (7, 24, 100, length):
        assert torch.equal(attend(chunk), alone), chunk
