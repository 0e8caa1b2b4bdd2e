"""QK-norm, clip, rotation and KV append of GQA; append, absorbed queries and values of MLA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crosspool.kernels.rope import rope_tables, rotate
from crosspool.kernels.triton.batch import RopeTable
from crosspool.kernels.triton.gqa import gqa_prepare
from crosspool.kernels.triton.mla import mla_append, mla_queries, mla_values
from crosspool.kernels.triton.tables import TensorTable
from support.device_kernels import (
    Paged,
    assert_close,
    paged,
    poisoned,
    random,
    rms_norm,
    slots,
)
from torch import Tensor

gpu = pytest.mark.gpu
EPS = 1e-6
SEGMENTS = ((40, 1), (0, 3), (15, 2))
BUCKET = 8


def rope_table(dim: int, interleaved: bool, device: torch.device) -> RopeTable:
    inverse = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
    cos, sin = rope_tables(torch.arange(64), inverse, 1.0)
    return RopeTable(cos.to(device), sin.to(device), interleaved)


def rotated(x: Tensor, made: Paged, rope: RopeTable) -> Tensor:
    """The project's rotation of x [rows, heads, dim], in float64."""
    positions = made.batch.positions[: made.rows].long()
    cos, sin = (t[positions].double() for t in (rope.cos, rope.sin))
    return rotate(x.double(), cos, sin, rope.interleaved)


def assert_nothing_else_written(made: Paged, width: int) -> None:
    written = int((~made.kv.isnan()).sum())
    assert written == sum(start + rows for start, rows in made.segments) * width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "q_heads, kv_heads, head_dim, norm, rules",
    [
        (4, 2, 64, "head", {}),  # tiny Qwen3
        (4, 2, 64, "none", {"interleaved": True}),
        (3, 3, 48, "full", {"clip": 0.8}),  # OLMoE's rules, and a head that is no power of two
        pytest.param(32, 4, 128, "head", {}, marks=gpu),  # Qwen3-30B-A3B
        pytest.param(16, 16, 128, "full", {"clip": 8.0}, marks=gpu),  # OLMoE-1B-7B
        pytest.param(32, 8, 128, "none", {}, marks=gpu),  # Mixtral
    ],
)
def test_gqa_rows(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    norm: str,
    rules: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    widths = [q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    made = paged(SEGMENTS, BUCKET, 2 * widths[1], dtype, device, with_own=False)
    rope = rope_table(head_dim, rules.get("interleaved", False), device)
    qkv = random(BUCKET, sum(widths), dtype=dtype, device=device)
    norms: list[list[Tensor]] = []
    if norm != "none":
        sizes = [head_dim, head_dim] if norm == "head" else widths[:2]
        norms = [[random(n, dtype=dtype, device=device) for _ in range(3)] for n in sizes]
    q = poisoned(BUCKET, q_heads, head_dim, dtype=dtype, device=device)
    tables = [TensorTable.of(n) for n in norms] or [None, None]
    clip = rules.get("clip")
    gqa_prepare(
        qkv,
        made.batch,
        made.layer,
        rope,
        q,
        made.kv,
        kv_heads=kv_heads,
        q_norm=tables[0],
        k_norm=tables[1],
        eps=EPS,
        clip=clip,
    )

    parts = list(qkv[: made.rows].double().split(widths, 1))
    for part, weights in enumerate(norms):
        weight = weights[1]
        heads = parts[part].unflatten(1, (-1, len(weight)))
        parts[part] = rms_norm(heads, weight, EPS).flatten(1)
    if clip is not None:
        parts = [part.clamp(-clip, clip) for part in parts]
    expected_q, expected_k = (
        rotated(part.unflatten(1, (-1, head_dim)), made, rope) for part in parts[:2]
    )
    assert_close(q[: made.rows], expected_q, dtype)
    assert q[made.rows :].isnan().all()
    assert_close(slots(made), torch.cat((expected_k.flatten(1), parts[2]), 1), dtype)
    assert_nothing_else_written(made, 2 * widths[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    "bucket, heads, latent, nope, rope_dim, v_dim",
    [
        (BUCKET, 4, 128, 32, 32, 32),  # tiny DeepSeek-V2 and GLM-4.7
        (20, 2, 96, 48, 16, 16),
        pytest.param(BUCKET, 16, 512, 128, 64, 128, marks=gpu),  # DeepSeek-V2-Lite
        pytest.param(BUCKET, 20, 512, 192, 64, 256, marks=gpu),  # GLM-4.7-Flash
        pytest.param(128, 16, 512, 128, 64, 128, marks=gpu),
    ],
)
def test_mla_rows(
    bucket: int,
    heads: int,
    latent: int,
    nope: int,
    rope_dim: int,
    v_dim: int,
    interleaved: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    made = paged(SEGMENTS, bucket, latent + rope_dim, dtype, device, with_own=False)
    rope = rope_table(rope_dim, interleaved, device)
    # Behind the compressed q, as one projection makes them.
    compressed = random(bucket, 16 + latent + rope_dim, dtype=dtype, device=device)[:, 16:]
    norms = [random(latent, dtype=dtype, device=device) for _ in range(3)]
    mla_append(compressed, TensorTable.of(norms), made.batch, made.layer, rope, made.kv, eps=EPS)
    rows = compressed[: made.rows]
    expected = torch.cat(
        (
            rms_norm(rows[:, :latent], norms[1], EPS),
            rotated(rows[:, None, latent:], made, rope)[:, 0],
        ),
        1,
    )
    assert_close(slots(made), expected, dtype)
    assert_nothing_else_written(made, latent + rope_dim)

    kv_b = [
        random(heads * (nope + v_dim), latent, dtype=dtype, device=device, scale=nope**-0.5)
        for _ in range(2)
    ]
    up = kv_b[1].double().unflatten(0, (heads, nope + v_dim))
    table = TensorTable.of(kv_b)
    plain = random(bucket, heads, nope + rope_dim, dtype=dtype, device=device)
    q = poisoned(bucket, heads, latent + rope_dim, dtype=dtype, device=device)
    mla_queries(plain, table, made.batch, made.layer, rope, q, nope=nope)
    absorbed = torch.einsum("thn,hnl->thl", plain[: made.rows, :, :nope].double(), up[:, :nope])
    turned = rotated(plain[: made.rows, :, nope:], made, rope)
    assert_close(q[: made.rows], torch.cat((absorbed, turned), -1), dtype)
    assert q[made.rows :].isnan().all()

    attended = random(bucket, heads, latent, dtype=dtype, device=device)
    out = poisoned(bucket, heads, v_dim, dtype=dtype, device=device)
    mla_values(attended, table, made.batch, made.layer, out, nope=nope)
    values = torch.einsum("thl,hvl->thv", attended[: made.rows].double(), up[:, nope:])
    assert_close(out[: made.rows], values, dtype)
    assert out[made.rows :].isnan().all()


def test_an_odd_latent_is_refused(device: torch.device) -> None:
    made = paged(SEGMENTS, BUCKET, 56, torch.bfloat16, device)
    table = TensorTable.of([random(2 * 32, 40, dtype=torch.bfloat16, device=device)])
    plain = random(BUCKET, 2, 32, dtype=torch.bfloat16, device=device)
    q = poisoned(BUCKET, 2, 56, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="multiple of 16, not 40"):
        mla_queries(plain, table, made.batch, made.layer, rope_table(16, False, device), q, nope=16)
