"""The layout of a model's KV pages: one after another in its range, across chunk borders."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

_Number = TypeVar("_Number", int, npt.NDArray[np.int64])


class KVSize(Protocol):
    """A model of which the KV cache's size per token is known: a ModelSpec, or the planner's."""

    @property
    def kv_bytes_per_token(self) -> int: ...


class KVLayout:
    """The KV pages of one model on one attention rank, in bytes of its virtual range.

    Page p covers bytes [p * page_bytes, (p + 1) * page_bytes), seen as [layers, page_size,
    kv_width] of the cache's dtype; chunk c covers [c * chunk_bytes, (c + 1) * chunk_bytes)."""

    def __init__(self, model: KVSize, page_size: int, chunk_bytes: int) -> None:
        """``page_size``: tokens per page; ``chunk_bytes``: the unit of physical memory."""
        self.page_size = page_size
        self.chunk_bytes = chunk_bytes
        self.page_bytes = model.kv_bytes_per_token * page_size

    def pages_for(self, tokens: _Number) -> _Number:
        """Pages that hold ``tokens`` tokens of one sequence."""
        return (tokens + (self.page_size - 1)) // self.page_size

    def chunks_for(self, pages: _Number) -> _Number:
        """Chunks beneath ``pages`` pages that lie one after another from the range's beginning."""
        return (pages * self.page_bytes + (self.chunk_bytes - 1)) // self.chunk_bytes

    def chunks_of_pages(self, page: int) -> range:
        """Chunks that page ``page`` touches."""
        first = page * self.page_bytes // self.chunk_bytes
        last = ((page + 1) * self.page_bytes - 1) // self.chunk_bytes
        return range(first, last + 1)

    def pages_in(self, chunks: int) -> int:
        """Whole pages in the first ``chunks`` chunks of the range."""
        return chunks * self.chunk_bytes // self.page_bytes

    def range_bytes(self, chunks: int) -> int:
        """Bytes of a virtual range in which the model can use all of ``chunks`` chunks."""
        return chunks * self.chunk_bytes
