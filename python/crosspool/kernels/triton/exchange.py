"""Copies of rows into the payloads of links between devices, and out of them.

A payload holds rows one after another, without gaps, in memory that this device reaches, its own or
a peer's. Kernels find payloads by address, in int64 tables on the device. They do not touch the
lane protocol's headers and signals."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.tables import pointer_at, tl_dtype

_BLOCK = 1024


def send_rows(
    x: torch.Tensor,
    payloads: torch.Tensor,
    count: torch.Tensor,
    link: torch.Tensor | None = None,
) -> None:
    """Writes the rows of ``x`` [bucket, hidden] to every one of ``payloads``, int64 [links], or
    with ``link``, int32 [1], to that one alone. ``count``: int32 [1], rows."""
    bucket, hidden = x.shape
    _send_kernel[(bucket, triton.cdiv(hidden, _BLOCK))](
        x,
        payloads,
        link,
        count,
        hidden,
        LINKS=len(payloads) if link is None else 1,
        ELEMENT=tl_dtype(x.dtype),
        BLOCK=_BLOCK,
    )


def combine_rows(parts: torch.Tensor, count: torch.Tensor, out: torch.Tensor) -> None:
    """Sums row i of all ``parts``, int64 [parts] of addresses, into out[i]: in their order, in
    float32, rounded once. ``out`` [bucket, hidden] may be one of them."""
    bucket, hidden = out.shape
    _combine_kernel[(bucket, triton.cdiv(hidden, _BLOCK))](
        parts,
        count,
        out,
        hidden,
        PARTS=len(parts),
        ELEMENT=tl_dtype(out.dtype),
        BLOCK=_BLOCK,
    )


def take_dispatch(
    payloads: torch.Tensor,
    link: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    served: torch.Tensor,
) -> None:
    """Copies the rows in payload ``link`` (int32 [1]) of ``payloads``, int64 [links], to ``out``
    [bucket, hidden], and counts them: ``served``, int64 [links, 3], holds dispatches, rows and
    bytes of each link."""
    bucket, hidden = out.shape
    _take_kernel[(bucket, triton.cdiv(hidden, _BLOCK))](
        payloads,
        link,
        count,
        out,
        served,
        hidden,
        hidden * out.itemsize,
        ELEMENT=tl_dtype(out.dtype),
        BLOCK=_BLOCK,
    )


@triton.jit
def _send_kernel(
    x: tl.tensor,
    payloads: tl.tensor,
    link: tl.tensor,  # or None
    count: tl.tensor,
    hidden: tl.tensor,
    LINKS: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * hidden + columns
    values = tl.load(x + at, columns < hidden)
    if link is not None:
        payloads += tl.load(link)
    for i in tl.static_range(LINKS):
        tl.store(pointer_at(payloads, i, ELEMENT) + at, values, columns < hidden)


@triton.jit
def _combine_kernel(
    parts: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    PARTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * hidden + columns
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(pointer_at(parts, part, ELEMENT) + at, columns < hidden).to(tl.float32)
    tl.store(out + at, total.to(ELEMENT), columns < hidden)


@triton.jit
def _take_kernel(
    payloads: tl.tensor,
    link: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    served: tl.tensor,
    hidden: tl.tensor,
    row_bytes: tl.tensor,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    rows = tl.load(count)
    if row >= rows:
        return
    which = tl.load(link)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * hidden + columns
    values = tl.load(pointer_at(payloads, which, ELEMENT) + at, columns < hidden)
    tl.store(out + at, values, columns < hidden)
    if (row == 0) & (tl.program_id(1) == 0):
        own = served + 3 * which
        tl.store(own, tl.load(own) + 1)
        tl.store(own + 1, tl.load(own + 1) + rows)
        tl.store(own + 2, tl.load(own + 2) + rows.to(tl.int64) * row_bytes)
