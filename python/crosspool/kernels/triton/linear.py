"""Products of weights with rows of activations, bound by reading the weights.

Made for buckets of up to a few hundred rows and for weights behind a table. For thousands of rows,
where the layer's pointers may be fixed at capture, ``torch.matmul`` (cuBLAS) is the faster choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.arrival import is_last_to_arrive
from crosspool.kernels.triton.tables import TensorTable, pointer_at, tl_dtype
from crosspool.kernels.triton.tiles import MULTIPROCESSORS, product_tile

_PARTIALS = 4 << 20
_MOST_SPLITS = 16


@dataclass(frozen=True)
class LinearWorkspace:
    """Memory for products that split K. One workspace serves every product of a lane, one after
    another; two streams cannot share it."""

    partials: torch.Tensor
    """float32, flat."""
    arrivals: torch.Tensor
    """int32, by tile of a product; zero between products."""

    @classmethod
    def allocate(cls, device: torch.device) -> LinearWorkspace:
        """Allocates 16 MiB; products that would need more do not split K."""
        return cls(
            partials=torch.empty(_PARTIALS, dtype=torch.float32, device=device),
            arrivals=torch.zeros(MULTIPROCESSORS, dtype=torch.int32, device=device),
        )


def linear(
    x: torch.Tensor,
    weight: TensorTable,
    layer: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    workspace: LinearWorkspace | None,
    *,
    bias: TensorTable | None = None,
    add: bool = False,
    rounded: bool = False,
) -> None:
    """out = x W^T + bias, or out += it (``add``: the residual's sum).

    ``x`` [bucket, K], rows at any stride, taken in the weight's dtype (a float32 router's x is
    widened); ``weight`` table of [N, K], K a multiple of 16; ``bias`` table of [N]; ``out``
    [bucket, N], rows at any stride, rounded to its own dtype (``rounded``: to the weight's dtype
    first). Without ``workspace`` K is not split."""
    bucket = out.shape[0]
    n, k = weight.shape
    tile = product_tile(bucket, n, k, weight.dtype)
    grid = (triton.cdiv(n, tile.columns), triton.cdiv(bucket, tile.rows))
    splits = 1
    if workspace is not None:
        splits = _splits(grid[0] * grid[1], k // tile.depth, bucket * n)
    _linear_kernel[(*grid, splits)](
        x,
        x.stride(0),
        weight.pointers,
        layer,
        None if bias is None else bias.pointers,
        count,
        out,
        out.stride(0),
        None if workspace is None else workspace.partials,
        None if workspace is None else workspace.arrivals,
        bucket,
        N=n,
        K=k,
        WEIGHT=tl_dtype(weight.dtype),
        BIAS=None if bias is None else tl_dtype(bias.dtype),
        SPLITS=splits,
        ADD=add,
        ROUND=rounded,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def head_logits(
    x: torch.Tensor,
    weight: TensorTable,
    layer: torch.Tensor,
    count: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """LM head: logits = x W^T rounded to the model's dtype, held as float32 [bucket, vocab].

    ``x`` [bucket, hidden]; ``weight`` a table of [vocab, hidden] of one layer, ``layer`` [0]."""
    linear(x, weight, layer, count, logits, None, rounded=True)


def _splits(tiles: int, steps: int, elements: int) -> int:
    """Number of ranges into which K is split: enough for every multiprocessor to work, dividing the
    steps evenly, with partial sums that the workspace can hold."""
    most = min(_MOST_SPLITS, MULTIPROCESSORS // tiles, _PARTIALS // elements, steps // 2)
    return max((s for s in range(1, most + 1) if steps % s == 0), default=1)


@triton.jit
def _linear_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    weights: tl.tensor,
    layer: tl.tensor,
    biases: tl.tensor,  # or None
    count: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    partials: tl.tensor,  # or None, without splits
    arrivals: tl.tensor,
    bucket: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    first = tl.program_id(1) * BLOCK_M
    split = tl.program_id(2)
    if first >= tl.load(count):
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < tl.load(count)
    index = tl.load(layer)
    weight = pointer_at(weights, index, WEIGHT)
    depths = split * (K // SPLITS) + tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + depths[None, :]
    w_at = weight + columns.to(tl.int64)[:, None] * K + depths[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K // SPLITS, BLOCK_K):
        a = tl.load(x_at, present[:, None], other=0.0).to(WEIGHT)
        if N % BLOCK_N == 0:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, (columns < N)[:, None], other=0.0)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    inside = present[:, None] & (columns < N)[None, :]
    if SPLITS > 1:
        # The last program to arrive adds the partial sums, in the order of the splits.
        part = partials + rows[:, None] * N + columns[None, :]
        tl.store(part + split * bucket * N, total, inside)
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if not is_last_to_arrive(arrivals + tile, SPLITS):
            return
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for s in range(SPLITS):
            total += tl.load(part + s * bucket * N, inside, other=0.0, cache_modifier=".cg")
    if biases is not None:
        bias = tl.load(pointer_at(biases, index, BIAS) + columns, columns < N, other=0.0)
        total += bias.to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    if ADD:
        total += tl.load(at, inside, other=0.0).to(tl.float32)
    if ROUND:
        total = total.to(WEIGHT)
    tl.store(at, total.to(out.dtype.element_ty), inside)
