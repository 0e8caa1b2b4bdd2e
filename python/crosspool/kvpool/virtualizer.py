"""The physical side of the KV pool: one budget of chunks under the virtual ranges of all models.

A model's range is as long as the model could ever use and costs nothing by itself. Chunks of the
budget are moved under it when a step first writes there, and away when no request uses them; the
kernels see an ordinary tensor over the whole range.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from crosspool.config.errors import ConfigError
from crosspool.kernels import native
from crosspool.kvpool.memory import available_bytes

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), first with 0 done, last with all done."""

_TOUCH_BYTES = 64 << 20
_OTHER_MAPPINGS = 4096
"""Memory mappings left to the rest of the process (libraries, threads, allocator)."""


class Virtualizer(Protocol):
    """Physical memory for the KV ranges of one attention rank. Chunk c of a model is byte
    c * chunk_bytes of its range; what a newly mapped chunk contains is undefined."""

    def map(self, model: int, chunks: Sequence[int]) -> None:
        """Puts memory of the budget under these chunks of the model's range.

        Raises ValueError, and maps nothing, when one is mapped already, lies outside the range, or
        when the budget is exhausted."""
        ...

    def unmap(self, model: int, chunks: Sequence[int]) -> None:
        """Takes the memory back into the budget at once; touching it is then a fault.

        Raises ValueError, and unmaps nothing, when one is not mapped."""
        ...

    def tensor(self, model: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The model's range from its beginning as a tensor; only mapped parts may be touched, and
        nothing after :meth:`close`. Raises ValueError when the range is too small for it."""
        ...

    def mapped_bytes(self, model: int) -> int: ...

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that are under no range."""
        ...

    def close(self) -> None:
        """Gives ranges and budget back to the system. A second call does nothing."""
        ...


class MremapVirtualizer:
    """The KV pool of one CPU device: huge-page chunks moved with ``mremap`` (no copy, no zeroing).

    >>> with MremapVirtualizer(1 << 30, 2 << 20, [1 << 30, 1 << 30]) as pool:
    ...     pool.map(0, [0, 1])
    ...     kv = pool.tensor(0, (pages, layers, page_size, kv_width), torch.bfloat16)
    """

    def __init__(
        self,
        budget_bytes: int,
        chunk_bytes: int,
        ranges: Sequence[int],
        progress: Progress | None = None,
    ) -> None:
        """Reserves the ranges and takes the whole budget from the system, which may take seconds
        per GiB where memory was never used before; ``progress`` is called on the way.

        ``budget_bytes`` is rounded down, and ``ranges`` (bytes per model) are rounded up, to
        multiples of ``chunk_bytes``, itself a multiple of 2 MiB. Raises ConfigError that names the
        field when the system does not have so much memory or so many mappings."""
        if chunk_bytes <= 0 or chunk_bytes % native.HUGE_PAGE:
            raise ConfigError(f"chunk_bytes: {chunk_bytes} is no multiple of {native.HUGE_PAGE}")
        slots = budget_bytes // chunk_bytes
        if slots == 0:
            raise ConfigError(
                f"kv_pool_bytes: {budget_bytes} bytes per attention rank are less than one chunk"
                f" of {chunk_bytes} bytes"
            )
        _check_mappings(slots, chunk_bytes)
        self.chunk_bytes = chunk_bytes
        self.budget_bytes = slots * chunk_bytes
        self._range_chunks = [-(-nbytes // chunk_bytes) for nbytes in ranges]
        self._free_slots = list(range(slots - 1, -1, -1))
        self._slot_of: list[dict[int, int]] = [{} for _ in ranges]
        self._ranges: list[int] = []
        self._parking = 0
        try:
            self._reserve()
            self._take_memory(progress or (lambda done, total: None))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def map(self, model: int, chunks: Sequence[int]) -> None:
        slot_of = self._slot_of[model]
        wrong = [c for c in chunks if c in slot_of or not 0 <= c < self._range_chunks[model]]
        if wrong or len(set(chunks)) != len(chunks):
            raise ValueError(f"model {model}: chunks {wrong or chunks} are mapped or out of range")
        if len(chunks) > len(self._free_slots):
            raise ValueError(
                f"model {model}: {len(chunks)} chunks to map, {len(self._free_slots)} are free"
            )
        if not chunks:
            return
        slots = self._free_slots[: -len(chunks) - 1 : -1]
        native.map_chunks(self._parking, self._ranges[model], self.chunk_bytes, slots, chunks)
        del self._free_slots[-len(chunks) :]
        slot_of.update(zip(chunks, slots, strict=True))

    def unmap(self, model: int, chunks: Sequence[int]) -> None:
        slot_of = self._slot_of[model]
        wrong = [c for c in chunks if c not in slot_of]
        if wrong or len(set(chunks)) != len(chunks):
            raise ValueError(f"model {model}: chunks {wrong or chunks} are not mapped")
        slots = [slot_of[c] for c in chunks]
        native.unmap_chunks(self._parking, self._ranges[model], self.chunk_bytes, slots, chunks)
        for chunk in chunks:
            del slot_of[chunk]
        self._free_slots.extend(slots)

    def tensor(self, model: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        import torch

        count, space = math.prod(shape), self._range_chunks[model] * self.chunk_bytes
        if count * dtype.itemsize > space:
            raise ValueError(
                f"model {model}: a tensor {tuple(shape)} of {dtype} takes"
                f" {count * dtype.itemsize} bytes, its range has {space}"
            )
        memory = (ctypes.c_char * space).from_address(self._ranges[model])
        return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)

    def mapped_bytes(self, model: int) -> int:
        return len(self._slot_of[model]) * self.chunk_bytes

    @property
    def free_bytes(self) -> int:
        return len(self._free_slots) * self.chunk_bytes

    def close(self) -> None:
        for address, chunks in zip(self._ranges, self._range_chunks, strict=False):
            native.release(address, chunks * self.chunk_bytes)
        self._ranges = []
        if self._parking:
            native.release(self._parking, self.budget_bytes)
            self._parking = 0
        self._free_slots = []
        self._slot_of = [{} for _ in self._slot_of]

    def _reserve(self) -> None:
        try:
            for chunks in self._range_chunks:
                self._ranges.append(native.reserve_range(chunks * self.chunk_bytes))
            self._parking = native.reserve_parking(self.budget_bytes)
        except OSError as error:
            raise ConfigError(
                f"kv_pool_bytes: the system refuses address space for {self.budget_bytes} bytes of"
                f" KV cache per attention rank ({error.strerror}); make the KV pool smaller, or"
                " raise the limit on address space (ulimit -v)"
            ) from error

    def _take_memory(self, progress: Progress) -> None:
        """Touches the whole budget, by the thread and so on the memory node that calls."""
        available = available_bytes()
        if self.budget_bytes > available:
            raise ConfigError(
                f"kv_pool_bytes: {self.budget_bytes} bytes of KV cache per attention rank do not"
                f" fit into the {available} bytes of memory that are available; make the KV pool"
                " smaller"
            )
        progress(0, self.budget_bytes)
        for offset in range(0, self.budget_bytes, _TOUCH_BYTES):
            nbytes = min(_TOUCH_BYTES, self.budget_bytes - offset)
            native.touch(self._parking + offset, nbytes)
            progress(offset + nbytes, self.budget_bytes)


def _check_mappings(slots: int, chunk_bytes: int) -> None:
    """Every mapped chunk is a mapping of its own, and may have another beside it."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if 2 * slots + _OTHER_MAPPINGS > most:
        usable = max(1, (most - _OTHER_MAPPINGS) // 2)
        larger = -(-slots * chunk_bytes // (usable * native.HUGE_PAGE)) * native.HUGE_PAGE
        raise ConfigError(
            f"chunk_bytes: {slots} chunks of {chunk_bytes} bytes need more memory mappings than"
            f" vm.max_map_count ({most}) allows; chunk_bytes of {larger} would do"
        )
