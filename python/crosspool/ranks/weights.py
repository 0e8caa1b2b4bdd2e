"""Tensors that a rank holds: filled from the checkpoint, and listed for whoever asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crosspool.weightpool.checkpoint import Checkpoint, Progress, Read

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class TensorListing:
    """One tensor, or share of one, on a rank."""

    layer: int | None
    key: str
    name: str
    """The checkpoint's name."""
    shape: tuple[int, ...]
    """Of the share held here."""
    dtype: str
    bytes: int


def fill(
    path: Path, reads: Sequence[tuple[int | None, Read]], progress: Progress
) -> list[TensorListing]:
    """Checks that the checkpoint has every tensor as expected, then reads them all into place.

    Raises ConfigError naming the tensor or the file that is wrong."""
    checkpoint = Checkpoint(path)
    checkpoint.check([read.ref for _, read in reads])
    checkpoint.load([read for _, read in reads], progress)
    return [
        TensorListing(
            layer=layer,
            key=read.ref.key,
            name=read.ref.name,
            shape=tuple(read.into.shape),
            dtype=str(read.into.dtype).removeprefix("torch."),
            bytes=read.into.nbytes,
        )
        for layer, read in reads
    ]
