"""The batch of one step as the kernels see it, in fixed buffers of a lane."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class DeviceBatch:
    """Rows of one model that go through the layers together; all int32, on the device.

    Rows of one sequence follow one another in the order of their positions. Example: a decode row
    at position 40 and a prompt chunk of positions 0 to 2, in a bucket of 8 rows with pages of
    16 tokens (``_`` may hold anything)::

        count      = [4]
        positions  = [40, 0, 1, 2, _, _, _, _]
        sequences  = [0, 1, 1, 1, _, _, _, _]
        page_table = [[7, 2, 9, _], [4, _, _, _], ...]
    """

    count: torch.Tensor
    """[1]: number of rows, 0 to bucket."""
    positions: torch.Tensor
    """[bucket]: each row's position in its sequence."""
    sequences: torch.Tensor
    """[bucket]: each row's line of ``page_table``."""
    page_table: torch.Tensor
    """[sequences, pages]: line s holds sequence s's pages, those of the batch's own KV included."""

    @property
    def bucket(self) -> int:
        return self.positions.shape[0]


@dataclass(frozen=True)
class RopeTable:
    """cos and sin by position: float32 [positions, dim / 2] each, rounded to the model's dtype
    where the model rounds them (:func:`crosspool.kernels.rope.rope_tables`).

    Rotated pairs lie half a head apart in every result, whatever ``interleaved`` says of the
    input."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @property
    def dim(self) -> int:
        return 2 * self.cos.shape[1]


@triton.jit
def kv_slot(
    kv: tl.tensor,
    line: tl.tensor,
    positions: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    inside: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    KV_WIDTH: tl.constexpr,
) -> tl.tensor:
    """Returns where a sequence's KV of ``positions`` lies in ``kv`` [pages, layers, page_size,
    kv_width]. ``line``: the sequence's line of the page table. Pages of positions that are not
    ``inside`` are not looked up."""
    page = tl.load(line + positions // PAGE_SIZE, inside, other=0).to(tl.int64)
    return kv + ((page * layers + layer) * PAGE_SIZE + positions % PAGE_SIZE) * KV_WIDTH


@triton.jit
def row_slot(
    row: tl.tensor,
    positions: tl.tensor,
    sequences: tl.tensor,
    page_table: tl.tensor,
    table_stride: tl.tensor,
    kv: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    KV_WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns a row's position, and where its own KV lies in ``kv``."""
    position = tl.load(positions + row)
    sequence = tl.load(sequences + row)
    line = page_table + sequence.to(tl.int64) * table_stride
    return position, kv_slot(kv, line, position, layer, layers, True, PAGE_SIZE, KV_WIDTH)


@triton.jit
def pair_places(
    pairs: tl.tensor, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns where the two features of each pair lie in a head that is not rotated yet."""
    if INTERLEAVED:
        first, second = 2 * pairs, 2 * pairs + 1
    else:
        first, second = pairs, HALF + pairs
    return first, second


@triton.jit
def rotated(
    first: tl.tensor,
    second: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    position: tl.tensor,
    pairs: tl.tensor,
    inside: tl.tensor,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rotates heads to their positions and returns their two halves, float32. ``pairs`` that are
    not ``inside`` are not the head's."""
    cos = tl.load(cosines + position * HALF + pairs, inside, other=0.0)
    sin = tl.load(sines + position * HALF + pairs, inside, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def is_single(
    sequences: tl.tensor, row: tl.tensor, sequence: tl.tensor, count: tl.tensor
) -> tl.tensor:
    """Whether the row is the only one of its sequence; meaningless past ``count``."""
    before = tl.load(sequences + row - 1, (row > 0) & (row < count), other=-1)
    behind = tl.load(sequences + row + 1, row + 1 < count, other=-1)
    return (before != sequence) & (behind != sequence)
