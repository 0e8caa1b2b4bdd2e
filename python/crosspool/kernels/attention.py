"""Paged attention over ragged batches: the reference kernels, in torch.

A model's KV cache is ``kv`` [pages, layers, page_size, kv_width], of the model's dtype or of floats
of 8 bits. Slots that a request has not written hold whatever another model left there, NaN
included, so they are never read into a sum.

A row comes out with the same bits whatever rows are beside it: a sequence's rows are computed in
blocks that begin at multiples of the block's size, whichever of them the batch has, so that a row's
place in its block, its keys and the shape of the call depend on its position alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from crosspool.kernels.advance import advance
from crosspool.kernels.linear import BLOCK_ROWS, at_once


@dataclass(frozen=True)
class RowSpan:
    """One request's rows of a batch."""

    first_row: int
    rows: int
    start: int
    """Position of the first row in the sequence."""
    pages: torch.Tensor
    """The request's page table, int64; it covers at least ``start + rows`` tokens."""
    state: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Pages of its recurrent state, int64; none where the model has no such state."""


def append_kv(
    kv: torch.Tensor,
    layer: int,
    slots: tuple[torch.Tensor, torch.Tensor],
    values: torch.Tensor,
) -> None:
    """Writes ``values`` [T, kv_width] to the slots (page, offset in the page), int64 [T] each."""
    kv[slots[0], layer, slots[1]] = as_cached(values, kv.dtype)


def as_cached(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns values as a cache of ``dtype`` holds them: floats of 8 bits are rounded to the
    nearest, ties to even, and those beyond the largest finite one become it. There is no scale."""
    if dtype == values.dtype:
        return values
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def gather_kv(
    kv: torch.Tensor, layer: int, pages: torch.Tensor, positions: range, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the KV of one request's positions, which follow one another, then zeros for those
    that are left of the last block of rows: [whole blocks from the first, kv_width] of ``dtype``,
    contiguous."""
    start, end = positions.start, positions.stop
    page_size = kv.shape[2]
    first = start // page_size
    used = pages[first : -(-end // page_size)]
    tokens = kv[:, layer].index_select(0, used).to(dtype)
    tokens = tokens.view(-1, kv.shape[3])[start - first * page_size :]
    padded = _block_end(end) - start
    if len(tokens) < padded:
        tokens = F.pad(tokens, (0, 0, 0, padded - len(tokens)))
    tokens[end - start :] = 0.0
    return tokens[:padded]


def gqa_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    segments: Sequence[RowSpan],
    *,
    kv_heads: int,
    scale: float,
    window: int | None,
    chunked: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of ``q`` [T, q_heads, head_dim] over the requests' cached
    K and V, among them the batch's own. Returns [T, q_heads, head_dim].

    ``window``: number of tokens that a query sees, itself included, or where ``chunked`` the size
    of the chunks, of which it sees its own; None: it sees all. ``sinks``: a logit
    of each query head that takes part in its softmaxes, [q_heads]; None: there are none."""
    head_dim = q.shape[2]
    out = torch.empty_like(q)
    for segment in segments:
        begin = _first_key(_block_start(segment.start), window, chunked)
        positions = range(begin, segment.start + segment.rows)
        tokens = gather_kv(kv, layer, segment.pages, positions, q.dtype)
        k, v = tokens.view(-1, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        out[rows] = _attend(
            q[rows],
            k,
            v,
            scale=scale,
            start=segment.start,
            begin=begin,
            window=window,
            chunked=chunked,
            sinks=sinks,
        )
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
    out = q.new_empty(*q.shape[:2], latent)
    for segment in segments:
        positions = range(segment.start + segment.rows)
        tokens = gather_kv(kv, layer, segment.pages, positions, q.dtype)[None]
        rows = slice(segment.first_row, segment.first_row + segment.rows)
        # The rope keys ride along as values: with equal widths torch takes its fused kernel.
        weighted = _attend(
            q[rows], tokens, tokens, scale=scale, start=segment.start, begin=0, window=None
        )
        out[rows] = weighted[..., :latent]
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    start: int,
    begin: int,
    window: int | None,
    chunked: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``q`` [rows, heads, d] at the positions from ``start``; ``k`` and ``v`` [kv_heads, whole
    blocks, d] at those from ``begin``. Returns [rows, heads, d].

    Rows of a block that are not in ``q`` are computed from zeros, and keys that a row must not see
    get a weight of zero, so that neither changes a bit of the others."""
    rows, heads, width = q.shape
    low, high = _block_start(start), _block_end(start + rows)
    group = heads // len(k)
    spread = (-1, group, -1, -1)
    queries = F.pad(q, (0, 0, 0, 0, start - low, high - start - rows))
    # [rows, heads, d] -> [kv_heads, queries of a KV head, rows, d]
    queries = queries.transpose(0, 1).reshape(len(k), group, -1, width)
    out = torch.empty_like(queries)
    for done in range(0, high - low, BLOCK_ROWS):
        at = low + done
        first, last = _first_key(at, window, chunked), at + BLOCK_ROWS
        keys = torch.arange(first, last)
        positions = torch.arange(at, last)[:, None]
        mask = keys <= positions
        if window is not None and chunked:
            mask &= keys >= positions // window * window
        elif window is not None:
            mask &= keys > positions - window
        of_block = (slice(None), slice(None), slice(done, done + BLOCK_ROWS))
        of_keys = (slice(None), slice(first - begin, last - begin))
        block_k, block_v = k[of_keys], v[of_keys]
        if sinks is not None:  # the score of a key of zeros is what the mask adds to it
            block_k, block_v = F.pad(block_k, (0, 0, 0, 1)), F.pad(block_v, (0, 0, 0, 1))
        block_k, block_v = block_k[:, None].expand(spread), block_v[:, None].expand(spread)
        most = at_once(BLOCK_ROWS * (last - first) * 2 * width)
        for piece in _pieces(len(k), group, most):
            advance()
            seen = mask if sinks is None else _with_sinks(mask, sinks.view(-1, group)[piece])
            out[piece][of_block] = F.scaled_dot_product_attention(
                queries[piece][of_block],
                block_k[piece],
                block_v[piece],
                attn_mask=seen,
                scale=scale,
            )
    skipped = start % BLOCK_ROWS
    return out.reshape(heads, -1, width).transpose(0, 1)[skipped : skipped + rows]


def _with_sinks(mask: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Returns what is added to the scores of the keys of ``mask`` [rows, keys] and of one more,
    whose score is the head's of ``sinks`` [kv_heads, group]: [kv_heads, group, rows, keys + 1]."""
    seen = torch.zeros(mask.shape, dtype=sinks.dtype).masked_fill_(~mask, -torch.inf)
    rows = (*sinks.shape, len(mask))
    return torch.cat((seen.expand(*rows, -1), sinks[..., None, None].expand(*rows, 1)), dim=-1)


def _pieces(kv_heads: int, group: int, heads: int) -> Iterator[tuple[slice, slice]]:
    """Divides query heads [kv_heads, group] into pieces of at most ``heads``."""
    kv_step, step = max(1, heads // group), min(group, heads)
    for kv_low in range(0, kv_heads, kv_step):
        for low in range(0, group, step):
            yield slice(kv_low, kv_low + kv_step), slice(low, low + step)


def _block_start(position: int) -> int:
    return position // BLOCK_ROWS * BLOCK_ROWS


def _block_end(position: int) -> int:
    return -(-position // BLOCK_ROWS) * BLOCK_ROWS


def _first_key(low: int, window: int | None, chunked: bool) -> int:
    """Start of the first block with a key that a row of the block at ``low`` sees."""
    if window is not None and chunked:
        return _block_start(low // window * window)
    return 0 if window is None else _block_start(max(0, low - window + 1))
