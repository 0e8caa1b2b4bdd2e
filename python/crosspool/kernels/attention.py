"""Paged attention over ragged batches: the reference kernels, in torch.

A model's KV cache is ``kv`` [pages, layers, page_size, kv_width]. Slots that a request has not
written hold whatever another model left there, NaN included, so they are never read into a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crosspool.kernels.advance import advance
from crosspool.kernels.linear import at_once

_BLOCK = 128
"""Query rows that are computed at a time. Blocks bound the mask's size, and keys that no row of a
block sees are skipped."""


@dataclass(frozen=True)
class RowSpan:
    """One request's rows of a batch."""

    first_row: int
    rows: int
    start: int
    """Position of the first row in the sequence."""
    pages: torch.Tensor
    """The request's page table, int64; it covers at least ``start + rows`` tokens."""


def append_kv(
    kv: torch.Tensor,
    layer: int,
    slots: tuple[torch.Tensor, torch.Tensor],
    values: torch.Tensor,
) -> None:
    """Writes ``values`` [T, kv_width] to the slots (page, offset in the page), int64 [T] each."""
    kv[slots[0], layer, slots[1]] = values


def gather_kv(
    kv: torch.Tensor, layer: int, pages: torch.Tensor, start: int, end: int
) -> torch.Tensor:
    """Returns the KV of one request's positions ``start`` to ``end``: [end - start, kv_width],
    contiguous."""
    page_size = kv.shape[2]
    first = start // page_size
    used = pages[first : -(-end // page_size)]
    tokens = kv[:, layer].index_select(0, used).view(-1, kv.shape[3])
    return tokens[start - first * page_size : end - first * page_size]


def gqa_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    segments: Sequence[RowSpan],
    *,
    kv_heads: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal grouped-query attention of ``q`` [T, q_heads, head_dim] over the requests' cached
    K and V, among them the batch's own. Returns [T, q_heads, head_dim].

    ``window``: number of tokens that a query sees, itself included; None: all."""
    heads, head_dim = q.shape[1:]
    out = torch.empty_like(q)
    for segment in segments:
        end = segment.start + segment.rows
        begin = 0 if window is None else max(0, segment.start - window + 1)
        tokens = gather_kv(kv, layer, segment.pages, begin, end)
        k, v = tokens.view(-1, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        # [rows, q_heads, d] -> [kv_heads, queries of a KV head, rows, d]
        queries = q[rows].transpose(0, 1).reshape(kv_heads, heads // kv_heads, -1, head_dim)
        result = _attend(queries, k, v, scale=scale, start=segment.start - begin, window=window)
        out[rows] = result.reshape(heads, -1, head_dim).transpose(0, 1)
    return out


def mla_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    segments: Sequence[RowSpan],
    *,
    latent: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention in the absorbed form: ``q`` [T, heads, kv_width] are queries against the
    cached latents and rope keys; returns the weighted latents [T, heads, latent]."""
    heads, width = q.shape[1:]
    out = q.new_empty(q.shape[0], heads, latent)
    for segment in segments:
        tokens = gather_kv(kv, layer, segment.pages, 0, segment.start + segment.rows)[None]
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        # The rope keys ride along as values: with equal widths torch takes its fused kernel.
        queries = q[rows].transpose(0, 1)[None]
        result = _attend(queries, tokens, tokens, scale=scale, start=segment.start, window=None)
        out[rows] = result.reshape(heads, -1, width)[..., :latent].transpose(0, 1)
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    start: int,
    window: int | None,
) -> torch.Tensor:
    """``q`` [kv_heads, group, rows, d], whose first row stands at key ``start``; ``k`` and ``v``
    [kv_heads, start + rows, d]. Returns [kv_heads, group, rows, d]."""
    kv_heads, group, rows, width = q.shape
    k, v = k[:, None], v[:, None]
    advance()
    if rows == 1:  # a KV head's queries take the place of rows: its keys are read once
        queries = q.reshape(kv_heads, 1, group, width)
        return F.scaled_dot_product_attention(queries, k, v, scale=scale).view(q.shape)
    k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
    out = torch.empty_like(q)
    for low in range(0, rows, _BLOCK):
        high = min(low + _BLOCK, rows)
        first = 0 if window is None else max(0, start + low - window + 1)
        last = start + high
        positions = torch.arange(start + low, last)[:, None]
        keys = torch.arange(first, last)
        mask = keys <= positions
        if window is not None:
            mask &= keys > positions - window
        for heads in _pieces(kv_heads, group, at_once((high - low) * (last - first) * 2 * width)):
            advance()
            out[heads][:, :, low:high] = F.scaled_dot_product_attention(
                q[heads][:, :, low:high],
                k[heads][:, :, first:last],
                v[heads][:, :, first:last],
                attn_mask=mask,
                scale=scale,
            )
    return out


def _pieces(kv_heads: int, group: int, heads: int) -> Iterator[tuple[slice, slice]]:
    """Divides query heads [kv_heads, group] into pieces of at most ``heads``."""
    kv_step, step = max(1, heads // group), min(group, heads)
    for kv_low in range(0, kv_heads, kv_step):
        for low in range(0, group, step):
            yield slice(kv_low, kv_low + kv_step), slice(low, low + step)
