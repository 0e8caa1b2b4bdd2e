"""The best token of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.memory import Memory
from crosspool.kernels.triton.order import ordered

_BLOCK = 4096


@dataclass(frozen=True)
class ArgmaxWorkspace:
    """Best key and index of every block of a row; int32 [bucket, blocks] each."""

    keys: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def allocate(cls, bucket: int, vocab: int, memory: Memory) -> ArgmaxWorkspace:
        shape = (bucket, triton.cdiv(vocab, _BLOCK))
        return cls(keys=memory.take(torch.int32, *shape), indices=memory.take(torch.int32, *shape))


def argmax(
    logits: torch.Tensor, count: torch.Tensor, best: torch.Tensor, workspace: ArgmaxWorkspace
) -> None:
    """best[i] = index of the largest of logits[i]: ``logits`` float32 [bucket, vocab], ``best``
    int32 [bucket]; the lowest index among equals; a NaN is larger than any number (torch.argmax's
    rules)."""
    bucket, vocab = logits.shape
    blocks = workspace.keys.shape[1]
    _block_kernel[(blocks, bucket)](
        logits, count, workspace.keys, workspace.indices, vocab, BLOCK=_BLOCK, num_warps=8
    )
    _row_kernel[(bucket,)](
        count,
        workspace.keys,
        workspace.indices,
        best,
        blocks,
        BLOCK=triton.next_power_of_2(blocks),
        num_warps=1,
    )


@triton.jit
def _best(keys: tl.tensor, indices: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    highest = tl.max(keys, 0)
    return highest, tl.min(tl.where(keys == highest, indices, 0x7FFFFFFF), 0)


@triton.jit
def _block_kernel(
    logits: tl.tensor,
    count: tl.tensor,
    keys: tl.tensor,
    indices: tl.tensor,
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    if row >= tl.load(count):
        return
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * vocab + token, token < vocab, other=float("-inf"))
    key, index = _best(ordered(x), token)
    at = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(keys + at, key)
    tl.store(indices + at, index)


@triton.jit
def _row_kernel(
    count: tl.tensor,
    keys: tl.tensor,
    indices: tl.tensor,
    best: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    b = tl.arange(0, BLOCK)
    key = tl.load(keys + row * blocks + b, b < blocks, other=-0x80000000)
    index = tl.load(indices + row * blocks + b, b < blocks, other=0x7FFFFFFF)
    _, token = _best(key, index)
    tl.store(best + row, token)
