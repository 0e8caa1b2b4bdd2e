"""Memory for the packed weights of a part of a model, which the system has back while the model
sleeps. Its addresses stay the same, so that tables that point to them need no change."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crosspool.kernels import native

_LINE = 64


class Arena:
    """Ranges of address space, which are memory between :meth:`take` and :meth:`drop`.

    >>> arena = Arena()
    >>> norm = arena.tensor([1024], torch.float32)
    >>> arena.take()  # from here on, `norm` may be touched
    >>> arena.drop()
    """

    def __init__(self) -> None:
        self.taken = False
        """Whether it is memory."""
        self._ranges: list[tuple[int, int]] = []
        self._next = self._end = 0

    def reserve(self, nbytes: int) -> int:
        """Returns where the next ``nbytes`` are, on a line of their own.

        Raises OSError when there is no address space."""
        if self._next + nbytes > self._end:
            size = max(round_up(nbytes, native.HUGE_PAGE), native.HUGE_PAGE)
            self._next = native.reserve_range(size)
            self._end = self._next + size
            self._ranges.append((self._next, size))
        address = self._next
        self._next += round_up(nbytes, _LINE)
        return address

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a tensor that lies in the arena."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * nbytes).from_address(self.reserve(nbytes))
        return torch.frombuffer(memory, dtype=dtype).view(*shape)

    def take(self) -> None:
        """Makes the ranges memory, which is zero. Raises OSError."""
        for address, nbytes in self._ranges:
            native.take_arena(address, nbytes)
        self.taken = True

    def drop(self) -> None:
        """Gives the memory back to the system. Nobody may touch it from now on."""
        for address, nbytes in self._ranges:
            native.drop_arena(address, nbytes)
        self.taken = False

    def close(self) -> None:
        """Gives the address space back, too."""
        while self._ranges:
            native.release(*self._ranges.pop())
        self.taken = False


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
