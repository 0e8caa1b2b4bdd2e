"""Paged attention of ragged batches, the decode way and the prefill way."""

from __future__ import annotations

import math

import pytest
import torch
from crosspool.kernels.attention import RowSpan, gqa_attention, mla_attention
from crosspool.kernels.triton.attention import AttentionWorkspace, attend
from crosspool.kernels.triton.batch import DeviceBatch, RopeTable
from crosspool.kernels.triton.gqa import gqa_prepare
from crosspool.kernels.triton.memory import DeviceMemory
from support.device_kernels import (
    Paged,
    assert_close,
    attention,
    int32,
    paged,
    poisoned,
    random,
)
from torch import Tensor

gpu = pytest.mark.gpu
RAGGED = ((130, 1), (0, 3), (0, 1), (17, 3))
LONG = ((4095, 1), (130, 1), (0, 1), (2048, 200), (0, 1), (511, 40))
SHAPES = [
    # q_heads, kv_heads, qk_dim, v_dim, window
    (4, 2, 64, 64, None),  # tiny Qwen3
    (4, 2, 64, 64, 20),
    (4, 1, 160, 128, None),  # tiny DeepSeek-V2 and GLM-4.7
    (3, 3, 48, 48, None),
    pytest.param(32, 4, 128, 128, None, marks=gpu),  # Qwen3-30B-A3B
    pytest.param(16, 1, 576, 512, None, marks=gpu),  # DeepSeek-V2-Lite
    pytest.param(20, 1, 576, 512, None, marks=gpu),  # GLM-4.7-Flash
    pytest.param(16, 16, 128, 128, None, marks=gpu),  # OLMoE-1B-7B
    pytest.param(64, 8, 64, 64, 128, marks=gpu),  # gpt-oss, a layer with a window
]


def run(
    made: Paged, q: Tensor, kv_heads: int, v_dim: int, window: int | None, *, mixed: bool
) -> Tensor:
    bucket, q_heads, qk_dim = q.shape
    out = poisoned(bucket, q_heads, v_dim, dtype=q.dtype, device=q.device)
    workspace = AttentionWorkspace.allocate(
        bucket, q_heads, kv_heads, v_dim, DeviceMemory(q.device)
    )
    workspace.out.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    attend(
        q,
        made.kv,
        made.batch,
        made.layer,
        out,
        workspace,
        kv_heads=kv_heads,
        scale=qk_dim**-0.5,
        window=window,
        mixed=mixed,
    )
    assert out[made.rows :].isnan().all()
    return out[: made.rows]


@pytest.mark.parametrize("mixed", [False, True], ids=["row by row", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("q_heads, kv_heads, qk_dim, v_dim, window", SHAPES)
def test_ragged_batches(
    q_heads: int,
    kv_heads: int,
    qk_dim: int,
    v_dim: int,
    window: int | None,
    dtype: torch.dtype,
    mixed: bool,
    device: torch.device,
) -> None:
    segments = RAGGED if device.type == "cpu" else LONG
    if dtype == torch.float32 and qk_dim == 576:
        pytest.skip("no model of this shape is held in float32")
    if dtype == torch.float32 and device.type == "cpu" and (q_heads == 3 or window is not None):
        pytest.skip("bfloat16 covers it in the interpreter")
    width = qk_dim if v_dim < qk_dim else 2 * kv_heads * qk_dim
    rows = sum(rows for _, rows in segments)
    made = paged(segments, rows + 2, width, dtype, device)
    q = random(rows + 2, q_heads, qk_dim, dtype=dtype, device=device)
    out = run(made, q, kv_heads, v_dim, window, mixed=mixed)
    expected = attention(
        q[:rows], made, kv_heads=kv_heads, v_dim=v_dim, scale=qk_dim**-0.5, window=window
    )
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("bucket", [1, 4])
@pytest.mark.parametrize(
    "q_heads, kv_heads, qk_dim, v_dim",
    [
        (4, 2, 64, 64),
        (4, 1, 160, 128),
        pytest.param(32, 4, 128, 128, marks=gpu),
        pytest.param(16, 1, 576, 512, marks=gpu),
        pytest.param(20, 1, 576, 512, marks=gpu),
    ],
)
def test_decode_with_many_splits(
    bucket: int, q_heads: int, kv_heads: int, qk_dim: int, v_dim: int, device: torch.device
) -> None:
    """Contexts of every kind: a token alone, whole blocks, more keys than splits times a block."""
    lengths = [299, 0, 63, 64] if device.type == "cpu" else [30000, 0, 63, 4096]
    width = qk_dim if v_dim < qk_dim else 2 * kv_heads * qk_dim
    dtype = torch.bfloat16
    made = paged([(n, 1) for n in lengths[:bucket]], bucket, width, dtype, device)
    q = random(bucket, q_heads, qk_dim, dtype=dtype, device=device)
    out = run(made, q, kv_heads, v_dim, None, mixed=False)
    expected = attention(q, made, kv_heads=kv_heads, v_dim=v_dim, scale=qk_dim**-0.5, window=None)
    assert_close(out, expected, dtype)


def test_a_cache_of_more_elements_than_int32_counts(device: torch.device) -> None:
    """Only one page of the cache is touched."""
    dtype, layers, page_size, width = torch.bfloat16, 64, 16, 256
    pages = 2**31 // (layers * page_size * width) + 2
    kv = torch.empty(pages, layers, page_size, width, dtype=dtype, device=device)
    history = random(3, width, dtype=dtype, device=device)
    kv[-1, -1, :2] = history[:2]
    batch = DeviceBatch(
        count=int32([1], device),
        positions=int32([2], device),
        sequences=int32([0], device),
        page_table=int32([[pages - 1]], device),
    )
    made = Paged(batch, kv, int32([layers - 1], device), [history], [(2, 1)], 1)
    own = torch.cat((random(1, 256, dtype=dtype, device=device), history[2:]), 1)
    q = poisoned(1, 4, 64, dtype=dtype, device=device)
    still = RopeTable(*(torch.full((3, 32), turn, device=device) for turn in (1.0, 0.0)), False)
    gqa_prepare(own, batch, made.layer, still, q, kv, kv_heads=2)
    assert torch.equal(kv[-1, -1, 2], history[2])
    for mixed in (False, True):
        out = run(made, q, 2, 64, None, mixed=mixed)
        expected = attention(q, made, kv_heads=2, v_dim=64, scale=0.125, window=None)
        assert_close(out, expected, dtype)


@pytest.mark.parametrize("window", [None, 20])
def test_reference_is_the_host_loops(window: int | None) -> None:
    """The float64 reference above against the project's torch kernels."""
    made = paged(RAGGED, 8, 256, torch.float32, torch.device("cpu"))
    first = 0
    segments = []
    for start, rows in made.segments:
        line = int(made.batch.sequences[first])
        pages = made.batch.page_table[line].long()
        segments.append(RowSpan(first_row=first, rows=rows, start=start, pages=pages))
        first += rows
    q = torch.randn(8, 4, 64)
    expected = attention(q, made, kv_heads=2, v_dim=64, scale=0.125, window=window)
    found = gqa_attention(q, made.kv, 1, segments, kv_heads=2, scale=0.125, window=window)
    assert_close(found, expected, torch.float32)
    if window is None:
        q = torch.randn(8, 3, 256)
        expected = attention(q, made, kv_heads=1, v_dim=192, scale=0.1, window=None)
        found = mla_attention(q, made.kv, 1, segments, latent=192, scale=0.1)
        assert_close(found, expected, torch.float32)
