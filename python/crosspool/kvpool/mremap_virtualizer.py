"""The virtualizer of a CPU device: huge-page chunks moved with ``mremap`` between a parking range
and the models' ranges."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError
from crosspool.kernels import native
from crosspool.kvpool.memory import available_bytes
from crosspool.kvpool.virtualizer import ChunkTable, Virtualizer, whole_chunks
from crosspool.observability.progress import Progress

if TYPE_CHECKING:
    import torch

_TOUCH_BYTES = 64 << 20
_OTHER_MAPPINGS = 4096
"""Memory mappings left to the rest of the process (libraries, threads, allocator)."""


class MremapVirtualizer(Virtualizer):
    """The KV pool of one CPU device: huge-page chunks moved with ``mremap`` (no copy, no zeroing).

    >>> with MremapVirtualizer(1 << 30, 2 << 20, {0: 1 << 30, 1: 1 << 30}) as pool:
    ...     pool.map(0, [0, 1])
    ...     kv = pool.tensor(0, (pages, layers, page_size, kv_width), torch.bfloat16)
    """

    def __init__(
        self,
        budget_bytes: int,
        chunk_bytes: int,
        ranges: Mapping[int, int],
        progress: Progress | None = None,
    ) -> None:
        """Reserves the ranges and takes the whole budget from the system, which may take seconds
        per GiB where memory was never used before; ``progress`` is called with
        bytes taken.

        ``budget_bytes`` is rounded down, and ``ranges`` (bytes per model) are rounded up, to
        multiples of ``chunk_bytes``, itself a multiple of 2 MiB. Raises ConfigError that names the
        field when the system does not have so much memory or so many mappings."""
        slots = whole_chunks(budget_bytes, chunk_bytes, native.HUGE_PAGE)
        _check_mappings(slots, chunk_bytes)
        self.budget_bytes = slots * chunk_bytes
        self._table = ChunkTable(chunk_bytes)
        self._table.free = list(range(slots - 1, -1, -1))
        self._ranges: dict[int, int] = {}
        """The address of each model's range."""
        self._parking = 0
        try:
            self._reserve(ranges)
            self._take_memory(progress or (lambda done: None))
        except BaseException:
            self.close()
            raise

    def add(self, model: int, nbytes: int) -> None:
        size = self._table.add(model, nbytes)
        try:
            self._ranges[model] = native.reserve_range(size)
        except OSError:
            self._table.remove(model)
            raise

    def remove(self, model: int) -> None:
        self._table.check_empty(model)
        native.release(self._ranges.pop(model), self._table.range_bytes(model))
        self._table.remove(model)

    def map(self, model: int, chunks: Sequence[int]) -> None:
        slots = self._table.slots_for(model, chunks)
        if not chunks:
            return
        native.map_chunks(
            self._parking, self._ranges[model], self._table.chunk_bytes, slots, chunks
        )
        self._table.note_mapped(model, chunks, slots)

    def unmap(self, model: int, chunks: Sequence[int]) -> None:
        slots = self._table.slots_under(model, chunks)
        native.unmap_chunks(
            self._parking, self._ranges[model], self._table.chunk_bytes, slots, chunks
        )
        self._table.note_unmapped(model, chunks)

    def tensor(self, model: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        import torch

        self._table.check_tensor(model, shape, dtype)
        space = self._table.range_bytes(model)
        memory = (ctypes.c_char * space).from_address(self._ranges[model])
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(*shape)

    def close(self) -> None:
        for model, address in self._ranges.items():
            native.release(address, self._table.range_bytes(model))
        self._ranges = {}
        if self._parking:
            native.release(self._parking, self.budget_bytes)
            self._parking = 0
        self._table.clear()

    def _reserve(self, ranges: Mapping[int, int]) -> None:
        try:
            for model, nbytes in ranges.items():
                self.add(model, nbytes)
            self._parking = native.reserve_parking(self.budget_bytes)
        except OSError as error:
            raise ConfigError(
                f"kv_pool_bytes: the system refuses address space for {self.budget_bytes} bytes of"
                f" KV cache per attention rank ({error.strerror}); make the KV pool smaller, or"
                " raise the limit on address space (ulimit -v)"
            ) from error

    def _take_memory(self, progress: Progress) -> None:
        """Touches the whole budget, with a thread for each core that this one may use: one thread
        would take long to clear a large pool, and memory comes from the nodes of those that do."""
        available = available_bytes()
        if self.budget_bytes > available:
            raise ConfigError(
                f"kv_pool_bytes: {self.budget_bytes} bytes of KV cache per attention rank do not"
                f" fit into the {available} bytes of memory that are available; make the KV pool"
                " smaller"
            )

        def touch(offset: int) -> int:
            nbytes = min(_TOUCH_BYTES, self.budget_bytes - offset)
            native.touch(self._parking + offset, nbytes)
            return nbytes

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for done in threads.map(touch, range(0, self.budget_bytes, _TOUCH_BYTES)):
                progress(done)


def _check_mappings(slots: int, chunk_bytes: int) -> None:
    """Raises ConfigError when there may be more memory mappings than the system allows: every
    mapped chunk is one, and may leave another beside it."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if 2 * slots + _OTHER_MAPPINGS > most:
        usable = max(1, (most - _OTHER_MAPPINGS) // 2)
        larger = -(-slots * chunk_bytes // (usable * native.HUGE_PAGE)) * native.HUGE_PAGE
        raise ConfigError(
            f"chunk_bytes: {slots} chunks of {chunk_bytes} bytes need more memory mappings than"
            f" vm.max_map_count ({most}) allows; chunk_bytes of {larger} would do"
        )
