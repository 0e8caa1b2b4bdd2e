"""The physical side of the KV pool: one budget of chunks under the virtual ranges of all models.

A model's range is as long as the model could ever use and costs nothing by itself. Chunks of the
budget are moved under it when a step first writes there, and away when no request uses them; the
kernels see an ordinary tensor over the whole range.

The interface is here, and what its two kinds share: :mod:`crosspool.kvpool.mremap_virtualizer` for
CPU devices, :mod:`crosspool.kvpool.cuda_virtualizer` for GPUs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from crosspool.config.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Virtualizer(ABC):
    """Physical memory for the KV ranges of one attention rank, closed at the end of a ``with``.
    Chunk c of a model is byte c * chunk_bytes of its range; what a newly mapped chunk contains is
    undefined."""

    _table: ChunkTable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def map(self, model: int, chunks: Sequence[int]) -> None:
        """Puts memory of the budget under these chunks of the model's range.

        Raises ValueError, and maps nothing, when one is mapped already, lies outside the range, or
        when the budget is exhausted."""

    @abstractmethod
    def unmap(self, model: int, chunks: Sequence[int]) -> None:
        """Takes the memory back into the budget at once; touching it is then a fault.

        Raises ValueError, and unmaps nothing, when one is not mapped."""

    @abstractmethod
    def tensor(self, model: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Returns the model's range, from its beginning, as a tensor. Only mapped parts may be
        touched, and nothing after :meth:`close`.

        Raises ValueError when the range is too small for it."""

    @abstractmethod
    def add(self, model: int, nbytes: int) -> None:
        """Reserves the range of a further model, rounded up to whole chunks. Raises OSError or
        CudaError when the system has no address space."""

    @abstractmethod
    def remove(self, model: int) -> None:
        """Gives a model's range back to the system; no tensor of it may be touched from now on.

        Raises ValueError while any chunk of it is mapped."""

    @abstractmethod
    def close(self) -> None:
        """Gives ranges and budget back to the system. A second call does nothing."""

    def mapped_bytes(self, model: int) -> int:
        return self._table.mapped_bytes(model)

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that are under no range."""
        return self._table.free_bytes


def whole_chunks(budget_bytes: int, chunk_bytes: int, unit: int) -> int:
    """Returns the number of chunks in the budget of one attention rank; ``unit``: the bytes that
    the device maps at a time.

    Raises ConfigError that names the field when a chunk is no multiple of it, or there is none."""
    if chunk_bytes <= 0 or chunk_bytes % unit:
        raise ConfigError(f"chunk_bytes: {chunk_bytes} is no multiple of {unit}")
    chunks = budget_bytes // chunk_bytes
    if chunks <= 0:
        raise ConfigError(
            f"kv_pool_bytes: {budget_bytes} bytes per attention rank are less than one chunk"
            f" of {chunk_bytes} bytes"
        )
    return chunks


class ChunkTable:
    """The slots of the budget, and the chunk of a model that each lies under.

    A slot is memory for one chunk, named by a number that means something to the virtualizer. The
    table tells what may be done; the virtualizer does it, and notes in the table what it has done.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.range_chunks: dict[int, int] = {}
        """Chunks of each model's range."""
        self.free: list[int] = []
        """Slots under no chunk; the last is used first."""
        self._slot_of: dict[int, dict[int, int]] = {}

    def add(self, model: int, nbytes: int) -> int:
        """Notes a further model with a range of ``nbytes``; returns them rounded up to whole
        chunks."""
        self.range_chunks[model] = -(-nbytes // self.chunk_bytes)
        self._slot_of[model] = {}
        return self.range_bytes(model)

    def check_empty(self, model: int) -> None:
        """Raises ValueError as :meth:`Virtualizer.remove` does."""
        if self._slot_of[model]:
            raise ValueError(f"model {model}: {len(self._slot_of[model])} chunks are mapped")

    def remove(self, model: int) -> None:
        """Forgets a model, of which nothing is mapped."""
        del self._slot_of[model], self.range_chunks[model]

    def slots_for(self, model: int, chunks: Sequence[int]) -> list[int]:
        """Returns free slots to map under ``chunks``, one each.

        Raises ValueError as :meth:`Virtualizer.map` does."""
        slot_of = self._slot_of[model]
        wrong = [c for c in chunks if c in slot_of or not 0 <= c < self.range_chunks[model]]
        if wrong or len(set(chunks)) != len(chunks):
            raise ValueError(f"model {model}: chunks {wrong or chunks} are mapped or out of range")
        if len(chunks) > len(self.free):
            raise ValueError(
                f"model {model}: {len(chunks)} chunks to map, {len(self.free)} are free"
            )
        return self.free[: -len(chunks) - 1 : -1]

    def note_mapped(self, model: int, chunks: Sequence[int], slots: Sequence[int]) -> None:
        """Notes that ``slots``, which :meth:`slots_for` gave, lie under ``chunks`` now."""
        del self.free[len(self.free) - len(slots) :]
        self._slot_of[model].update(zip(chunks, slots, strict=True))

    def slots_under(self, model: int, chunks: Sequence[int]) -> list[int]:
        """Returns the slots under ``chunks``, one each.

        Raises ValueError as :meth:`Virtualizer.unmap` does."""
        slot_of = self._slot_of[model]
        wrong = [c for c in chunks if c not in slot_of]
        if wrong or len(set(chunks)) != len(chunks):
            raise ValueError(f"model {model}: chunks {wrong or chunks} are not mapped")
        return [slot_of[c] for c in chunks]

    def note_unmapped(self, model: int, chunks: Sequence[int]) -> None:
        """Notes that the slots under ``chunks`` are free now."""
        self.free.extend(self._slot_of[model].pop(chunk) for chunk in chunks)

    def mapped(self, model: int) -> list[int]:
        """The model's mapped chunks, in the order of mapping."""
        return list(self._slot_of[model])

    def clear(self) -> None:
        """Forgets all slots, mapped or free."""
        self.free = []
        self._slot_of = {model: {} for model in self._slot_of}

    def mapped_bytes(self, model: int) -> int:
        return len(self._slot_of[model]) * self.chunk_bytes

    @property
    def free_bytes(self) -> int:
        return len(self.free) * self.chunk_bytes

    def range_bytes(self, model: int) -> int:
        return self.range_chunks[model] * self.chunk_bytes

    def check_tensor(self, model: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raises ValueError when the model's range is too small for the tensor."""
        needed, space = math.prod(shape) * dtype.itemsize, self.range_bytes(model)
        if needed > space:
            raise ValueError(
                f"model {model}: a tensor {tuple(shape)} of {dtype} takes {needed} bytes, its"
                f" range has {space}"
            )
