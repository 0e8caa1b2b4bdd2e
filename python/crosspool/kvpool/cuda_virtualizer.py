"""The virtualizer of a GPU: memory handles that the driver maps under the models' ranges.

Creating a handle is by far the dearest call, so all of them are made ahead; then a step that needs
a chunk pays for its mapping and, once for each run of neighbouring chunks, for the access to it.
Each chunk is a mapping of its own, because the driver takes back whole mappings only.

``benchmark/gpu_vmm.py`` measures each call on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from crosspool.config.errors import ConfigError
from crosspool.kernels.cuda_driver import CudaDriver, CudaError, allow_access
from crosspool.kernels.dlpack import tensor_at
from crosspool.kvpool.virtualizer import ChunkTable, Virtualizer, whole_chunks
from crosspool.observability.progress import Progress


class CudaVirtualizer(Virtualizer):
    """The KV pool of one GPU.

    A chunk may be unmapped only after the event of the last step that touches it, because
    cuMemUnmap may take memory from under a kernel; nothing else is asked of the kernels. A slot of
    the table is a handle.

    >>> with CudaVirtualizer(CudaBindings(0), 8 << 30, 16 << 20, {0: 8 << 30, 1: 8 << 30}) as pool:
    ...     pool.map(0, [0, 1])
    ...     kv = pool.tensor(0, (pages, layers, page_size, kv_width), torch.bfloat16)
    """

    def __init__(
        self,
        driver: CudaDriver,
        budget_bytes: int,
        chunk_bytes: int,
        ranges: Mapping[int, int],
        progress: Progress | None = None,
    ) -> None:
        """Reserves the ranges and creates the whole budget's handles; ``progress`` is called with
        bytes created.

        ``budget_bytes`` is rounded down, and ``ranges`` (bytes per model) are rounded up, to
        multiples of ``chunk_bytes``, itself a multiple of the driver's granularity. Raises
        ConfigError that names the field when that does not hold or the device has too little
        memory, CudaError when the driver refuses for another reason."""
        chunks = whole_chunks(budget_bytes, chunk_bytes, driver.granularity)
        self.budget_bytes = chunks * chunk_bytes
        self.quiesced: Callable[[], contextlib.AbstractContextManager[object]] = (
            contextlib.nullcontext
        )
        """Entered around driver calls that may wait for running kernels. The owner of a resident
        loop on this device sets it to what stops the loop meanwhile, or leaves it where the driver
        is known not to wait for one."""
        self._driver = driver
        self._table = ChunkTable(chunk_bytes)
        self._ranges: dict[int, int] = {}
        """The address of each model's range."""
        try:
            for model, nbytes in ranges.items():
                self.add(model, nbytes)
            self._take_memory(progress or (lambda done: None))
        except BaseException:
            self.close()
            raise

    def add(self, model: int, nbytes: int) -> None:
        size = self._table.add(model, nbytes)
        try:
            self._ranges[model] = self._driver.reserve(size)
        except CudaError:
            self._table.remove(model)
            raise

    def remove(self, model: int) -> None:
        self._table.check_empty(model)
        with self.quiesced():
            self._driver.free_reservation(self._ranges[model], self._table.range_bytes(model))
        del self._ranges[model]
        self._table.remove(model)

    def map(self, model: int, chunks: Sequence[int]) -> None:
        """Maps as :meth:`~crosspool.kvpool.virtualizer.Virtualizer.map` does. Raises CudaError, and
        maps nothing, when the driver refuses."""
        table, driver = self._table, self._driver
        slots, nbytes = table.slots_for(model, chunks), table.chunk_bytes
        if not chunks:
            return
        with self.quiesced(), contextlib.ExitStack() as undo:
            for chunk, slot in zip(chunks, slots, strict=True):
                address = self._address(model, chunk)
                driver.map(address, nbytes, slot)
                undo.callback(driver.unmap, address, nbytes)
            for run in _runs(chunks):
                allow_access(driver, self._address(model, run.start), len(run) * nbytes)
            undo.pop_all()
        table.note_mapped(model, chunks, slots)

    def unmap(self, model: int, chunks: Sequence[int]) -> None:
        """Unmaps as :meth:`~crosspool.kvpool.virtualizer.Virtualizer.unmap` does. Raises CudaError
        when the driver refuses; the chunks before the refused one are then unmapped."""
        self._table.slots_under(model, chunks)
        if not chunks:
            return
        with self.quiesced():
            for chunk in chunks:
                self._driver.unmap(self._address(model, chunk), self._table.chunk_bytes)
                self._table.note_unmapped(model, [chunk])

    def tensor(self, model: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self._table.check_tensor(model, shape, dtype)
        return tensor_at(self._ranges[model], shape, dtype, self._driver.dlpack_device, owner=self)

    def close(self) -> None:
        """Gives ranges and handles back to the system. Raises CudaError when the driver refuses;
        another call then goes on where this one failed."""
        table, driver = self._table, self._driver
        for model in self._ranges:
            self.unmap(model, table.mapped(model))
        with self.quiesced():
            while table.free:
                driver.release(table.free[-1])
                table.free.pop()
            while self._ranges:
                model, address = next(reversed(self._ranges.items()))
                driver.free_reservation(address, table.range_bytes(model))
                del self._ranges[model]

    def _address(self, model: int, chunk: int) -> int:
        return self._ranges[model] + chunk * self._table.chunk_bytes

    def _take_memory(self, progress: Progress) -> None:
        """Creates the whole budget's handles."""
        nbytes, driver, free = self._table.chunk_bytes, self._driver, self._table.free
        available, total = driver.memory()
        try:
            if self.budget_bytes > available:
                raise ConfigError(self._too_large(available, total))
            while len(free) * nbytes < self.budget_bytes:
                free.append(driver.create(nbytes))
                progress(nbytes)
        except CudaError as error:
            if error.is_out_of_memory:
                raise ConfigError(self._too_large(available, total)) from error
            raise

    def _too_large(self, available: int, total: int) -> str:
        return (
            f"kv_pool_bytes: {self.budget_bytes} bytes of KV cache per attention rank do not fit"
            f" into the {available} bytes that {self._driver.name} has free, of {total}; make the"
            " KV pool smaller"
        )


def _runs(chunks: Sequence[int]) -> Iterator[range]:
    """Yields the chunks as ranges of neighbours, ascending."""
    ordered = sorted(chunks)
    start = ordered[0]
    for chunk, following in zip(ordered, [*ordered[1:], None], strict=True):
        if following != chunk + 1:
            yield range(start, chunk + 1)
            if following is not None:
                start = following
