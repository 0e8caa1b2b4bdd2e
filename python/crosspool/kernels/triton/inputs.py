"""Copies of a step's inputs to a lane's buffers: from host memory that the device can read, or, for
the further steps of a lease, from the tokens that the lane chose last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.tables import pointer_at

_BLOCK = 1024


def take_inputs(address: torch.Tensor, inputs: torch.Tensor, head: int, line: int) -> None:
    """Copies a step's inputs to ``inputs``, int32, flat: the first ``head`` elements, then lines of
    ``line`` elements each (the page table).

    ``address``: int64 [1] on the device, where the source lies: as long as ``inputs``, 16-byte
    aligned. Its elements 0 and 1 say how many of the lines, and how many elements of each, are of
    use: only these are copied."""
    lines = (inputs.shape[0] - head) // line
    blocks = max(triton.cdiv(head, _BLOCK), triton.cdiv(line, _BLOCK))
    _take_kernel[(1 + lines, blocks)](address, inputs, head, line, BLOCK=_BLOCK)


def feed(
    chosen: torch.Tensor,
    count: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    sampled_positions: torch.Tensor,
) -> None:
    """Prepares the next step of a lease: row i's token is chosen[i], one position further, and so
    is the token to pick after it. ``chosen``, ``tokens``, ``positions`` int32 and
    ``sampled_positions`` int64, [bucket] or longer; ``count`` int32 [1]: rows."""
    bucket = tokens.shape[0]
    grid = (triton.cdiv(bucket, _BLOCK),)
    _feed_kernel[grid](chosen, count, tokens, positions, sampled_positions, BLOCK=_BLOCK)


@triton.jit
def _take_kernel(
    address: tl.tensor, inputs: tl.tensor, head: tl.tensor, line: tl.tensor, BLOCK: tl.constexpr
) -> None:
    source = pointer_at(address, 0, tl.int32)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.program_id(0)
    if number == 0:
        values = tl.load(source + columns, columns < head)
        tl.store(inputs + columns, values, columns < head)
    else:
        lines = tl.load(source)
        used = tl.load(source + 1)
        if (number <= lines) & (tl.program_id(1) * BLOCK < used):
            at = head + (number - 1).to(tl.int64) * line + columns
            values = tl.load(source + at, columns < used)
            tl.store(inputs + at, values, columns < used)


@triton.jit
def _feed_kernel(
    chosen: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    positions: tl.tensor,
    sampled_positions: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < tl.load(count)
    tl.store(tokens + rows, tl.load(chosen + rows, there), there)
    tl.store(positions + rows, tl.load(positions + rows, there) + 1, there)
    tl.store(sampled_positions + rows, tl.load(sampled_positions + rows, there) + 1, there)
