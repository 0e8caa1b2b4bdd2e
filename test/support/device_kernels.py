"""What the tests of the device's kernels share: inputs with poison around them, and references in
float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from crosspool.kernels.triton.batch import DeviceBatch
from torch import Tensor

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 2e-6}
"""Largest relative error of a result."""


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; NaN where ``out`` has any."""
    difference = (out.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def assert_close(out: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert out.shape == reference.shape
    error = relative_error(out, reference)
    assert error <= LIMITS[dtype], f"relative error {error:.2e}"


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN all over: what a kernel did not write shows."""
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def int32(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Paged:
    """A batch, its cache, and what the cache holds of each sequence."""

    batch: DeviceBatch
    kv: Tensor
    layer: Tensor
    histories: list[Tensor]
    """[start + rows, kv_width] of each sequence, the batch's own rows at the end."""
    segments: list[tuple[int, int]]
    """(position of the first row, rows) of each sequence."""
    rows: int


def paged(
    segments: Sequence[tuple[int, int]],
    bucket: int,
    kv_width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    page_size: int = 16,
    with_own: bool = True,
) -> Paged:
    """A batch over a cache of 3 layers, of which layer 1 holds the histories (without the batch's
    own rows unless ``with_own``) on pages in random order, and NaN everywhere else."""
    needs = [-(-(start + rows) // page_size) for start, rows in segments]
    order = torch.randperm(sum(needs) + 2)
    kv = poisoned(len(order), 3, page_size, kv_width, dtype=dtype, device=device)
    table = torch.full((len(segments) + 2, max(needs) + 1), -(2**30), dtype=torch.int32)
    lines = torch.randperm(len(segments) + 1).tolist()
    positions: list[int] = []
    sequences: list[int] = []
    histories = []
    used = 0
    for (start, rows), need, line in zip(segments, needs, lines, strict=False):
        pages = order[used : used + need]
        used += need
        table[line, :need] = pages.int()
        history = random(start + rows, kv_width, dtype=dtype, device=device)
        histories.append(history)
        held = start + rows if with_own else start
        at = torch.arange(held)
        kv[pages[at // page_size].to(device), 1, (at % page_size).to(device)] = history[:held]
        positions += range(start, start + rows)
        sequences += [line] * rows
    count = len(positions)
    padding = [2**30] * (bucket - count)
    batch = DeviceBatch(
        count=int32([count], device),
        positions=int32(positions + padding, device),
        sequences=int32(sequences + padding, device),
        page_table=table.to(device),
    )
    return Paged(batch, kv, int32([1], device), histories, list(segments), count)


def slots(made: Paged) -> Tensor:
    """What layer 1 of the cache holds of the batch's rows, [rows, kv_width]."""
    positions = made.batch.positions[: made.rows].long()
    lines = made.batch.sequences[: made.rows].long()
    page_size = made.kv.shape[2]
    pages = made.batch.page_table[lines, positions // page_size].long()
    return made.kv[pages, 1, positions % page_size]


def attention(
    q: Tensor, made: Paged, *, kv_heads: int, v_dim: int, scale: float, window: int | None
) -> Tensor:
    """Causal attention of every row in float64: [rows, q_heads, v_dim]."""
    heads, qk_dim = q.shape[1:]
    results = []
    first = 0
    for (start, rows), history in zip(made.segments, made.histories, strict=True):
        keys = history[:, : kv_heads * qk_dim].double().unflatten(1, (kv_heads, qk_dim))
        if history.shape[1] == kv_heads * qk_dim:
            values = keys[..., :v_dim]
        else:
            values = history[:, kv_heads * qk_dim :].double().unflatten(1, (kv_heads, v_dim))
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        scores = torch.einsum("thd,shd->hts", q[first : first + rows].double(), keys) * scale
        positions = torch.arange(start, start + rows, device=q.device)[:, None]
        at = torch.arange(start + rows, device=q.device)
        hidden = at > positions
        if window is not None:
            hidden |= at <= positions - window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        results.append(torch.einsum("hts,shd->thd", weights, values))
        first += rows
    return torch.cat(results)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x.double() @ gate_up.double().T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.double().T
