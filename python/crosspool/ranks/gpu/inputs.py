"""A step's inputs as one run of int32 elements, which the host writes and the embedding stage
reads.

Every (model, row bucket) has a layout of its own, so that a step of one row transfers no more than
a row needs. The page table comes last, and only the used part of it crosses to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from crosspool.ranks.gpu.host_side import HostSide

_NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}
_STOPS = 64
"""Stop tokens per row, on average, for which a lease has room."""
_HEADER = 4
"""Elements of the header: sequences, pages of the longest sequence, wanted rows, one unused."""


@dataclass(frozen=True)
class InputLayout:
    """Place and size of each field."""

    bucket: int
    """Rows of the bucket."""
    sequences: int
    """Lines of the page table."""
    pages: int
    """Pages of each line."""

    @property
    def wanted(self) -> int:
        """Rows of one step that may want a token: at most one of each sequence."""
        return self.sequences

    @property
    def fields(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """First element, count and dtype of each field by its name; the page table is not among
        them."""
        found: dict[str, tuple[int, int, torch.dtype]] = {}
        at = _HEADER
        for name, count, dtype in (
            ("seed", self.wanted, torch.int64),
            ("position", self.wanted, torch.int64),
            ("top_p", self.wanted, torch.float64),
            ("temperature", self.wanted, torch.float32),
            ("min_p", self.wanted, torch.float32),
            ("top_k", self.wanted, torch.int32),
            ("wanted_rows", self.wanted, torch.int32),
            ("tokens", self.bucket, torch.int32),
            ("positions", self.bucket, torch.int32),
            ("row_sequences", self.bucket, torch.int32),
        ):
            found[name] = at, count, dtype
            at += _up(count * (dtype.itemsize // 4))
        return found

    @property
    def head(self) -> int:
        """Elements before the page table."""
        at, count, dtype = list(self.fields.values())[-1]
        return at + _up(count * (dtype.itemsize // 4))

    @property
    def elements(self) -> int:
        """Elements of the whole, page table included."""
        return self.head + self.sequences * self.pages


class HostInputs:
    """The host's view of a step's inputs over ``memory``, int32 with at least ``elements``
    elements."""

    def __init__(self, layout: InputLayout, memory: Tensor) -> None:
        flat = memory.numpy()[: layout.elements]
        self._header = flat[:_HEADER]
        self._fields = {
            name: flat[at : at + count * (dtype.itemsize // 4)].view(_NUMPY[dtype])
            for name, (at, count, dtype) in layout.fields.items()
        }
        self.page_table = flat[layout.head :].reshape(layout.sequences, layout.pages)
        """int32 [sequences, pages]."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self._fields[name]

    def close(self, sequences: int, pages: int, wanted: int) -> None:
        """Writes the header: lines of the page table, pages of the longest, wanted rows."""
        self._header[:3] = sequences, pages, wanted


class HostMemory:
    """Host memory through which the steps of one lane pass inputs to the device and get tokens
    back."""

    def __init__(self, elements: int, wanted: int, lease: int, host: HostSide) -> None:
        """``elements``: int32 elements of the largest inputs; ``wanted``: tokens of one step;
        ``lease``: most steps of a lease."""
        self.inputs = host.full((elements,), 0, torch.int32)
        self.tokens = host.full((lease * wanted,), -1, torch.int32)
        self.stops = host.full((_STOPS * wanted,), 0, torch.int32)
        self.stop_ends = host.full((wanted,), 0, torch.int32)
        self.lease = lease


def _up(elements: int) -> int:
    """Rounds int32 elements up to a multiple of 16 bytes."""
    return -(-elements // 4) * 4
