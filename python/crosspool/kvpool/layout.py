"""The layout of a model's KV pages: one after another in its range, across chunk borders.

A model with gated delta nets has recurrent state beside KV: a fixed number of bytes per request. It
lies in pages, too, the first ones of each request. So it is promised, mapped and freed as KV is, by
the same rules, and is lost with its rank and computed again as KV is. Nothing of it can be shared,
as every token changes it: these models have no prefix cache, and each of the ``n`` choices of a
request computes its prompt by itself.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from crosspool.config.errors import ConfigError

_Number = TypeVar("_Number", int, npt.NDArray[np.int64])


class KVSize(Protocol):
    """A model of which the KV cache's size per token, and the recurrent state's per request, is
    known: a ModelSpec, or the planner's."""

    @property
    def kv_bytes_per_token(self) -> int: ...

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state per request; 0 for none."""

    @property
    def state_row(self) -> int:
        """Bytes of recurrent state that lie together in one page."""


class KVLayout:
    """The KV pages of one model on one attention rank, in bytes of its virtual range.

    Page p covers bytes [p * page_bytes, (p + 1) * page_bytes), seen as [layers, page_size,
    kv_width] of the cache's dtype; chunk c covers [c * chunk_bytes, (c + 1) * chunk_bytes)."""

    def __init__(self, model: KVSize, page_size: int, chunk_bytes: int) -> None:
        """``page_size``: tokens per page; ``chunk_bytes``: the unit of physical memory.

        Raises ConfigError where a page is too small for a row of the model's recurrent state."""
        self.page_size = page_size
        self.chunk_bytes = chunk_bytes
        self.page_bytes = model.kv_bytes_per_token * page_size
        self.state_pages = state_pages(model, page_size)
        """Pages of recurrent state of each sequence."""

    def pages_for(self, tokens: _Number) -> _Number:
        """Pages of one sequence of ``tokens`` tokens, with its recurrent state."""
        return (tokens + (self.page_size - 1)) // self.page_size + self.state_pages

    def tokens_in(self, pages: int) -> int:
        """Tokens of one sequence for which ``pages`` pages have room."""
        return max(0, pages - self.state_pages) * self.page_size

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


def state_pages(model: KVSize, page_size: int) -> int:
    """Returns the pages of recurrent state of each request, 0 for a model that has none. A row of
    it lies in one page as a whole. Raises ConfigError where a page is too small for one."""
    if not model.state_bytes:
        return 0
    row, token = model.state_row, model.kv_bytes_per_token
    rows = token * page_size // row
    if not rows:
        raise ConfigError(
            f"page_size: {page_size}: a page of {token * page_size} bytes holds no row of the "
            f"recurrent state, {row} bytes: give at least {-(-row // token)}"
        )
    return -(-model.state_bytes // (rows * row))
