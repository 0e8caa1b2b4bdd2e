"""A step's inputs as one run of int32 elements: written by the host, read by the embedding stage.

Every (model, row bucket) has a layout of its own, so that a step of one row brings one row's worth.
The page table comes last, and only the part of it that is used crosses to the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}
_STOPS = 64
"""Stop tokens of a row, in the mean, that a lease has room for."""
_HEADER = 4
"""Elements: sequences, pages of the longest sequence, wanted rows, one that is unused."""


@dataclass(frozen=True)
class InputLayout:
    """Where each field lies, and how large it is."""

    bucket: int
    """Rows."""
    sequences: int
    """Lines of the page table."""
    pages: int
    """Pages of a line."""

    @property
    def wanted(self) -> int:
        """Rows that may want a token in one step: one of each sequence at most."""
        return self.sequences

    @property
    def fields(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """By name: first element, count and dtype, without the page table."""
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
        """Of all."""
        return self.head + self.sequences * self.pages


class HostInputs:
    """The host's view of a step's inputs over int32 ``memory``, of at least ``elements``."""

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
        """Says how much there is: lines of the page table, pages in the longest, wanted rows."""
        self._header[:3] = sequences, pages, wanted


class HostMemory:
    """What the steps of one lane leave in host memory for the device, and get back from it. On a
    GPU it is pinned, and so readable there."""

    def __init__(self, elements: int, wanted: int, lease: int, *, pinned: bool) -> None:
        """``elements``: of the largest inputs; ``wanted``: tokens of one step; ``lease``: steps."""
        self.inputs = torch.zeros(elements, dtype=torch.int32, pin_memory=pinned)
        self.tokens = torch.full((lease * wanted,), -1, dtype=torch.int32, pin_memory=pinned)
        self.stops = torch.zeros(_STOPS * wanted, dtype=torch.int32, pin_memory=pinned)
        self.stop_ends = torch.zeros(wanted, dtype=torch.int32, pin_memory=pinned)
        self.lease = lease


def _up(elements: int) -> int:
    """To a multiple of 16 bytes."""
    return -(-elements // 4) * 4
