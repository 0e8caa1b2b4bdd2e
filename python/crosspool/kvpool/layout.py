"""The layout of a model's KV pages: one after another in its range, across chunk borders."""

from __future__ import annotations

from crosspool.models.spec import ModelSpec


class KVLayout:
    """The KV pages of one model on one attention rank, in bytes of its virtual range.

    Page p covers bytes [p * page_bytes, (p + 1) * page_bytes), seen as [layers, page_size,
    kv_width] of the model's dtype; chunk c covers [c * chunk_bytes, (c + 1) * chunk_bytes)."""

    def __init__(self, spec: ModelSpec, page_size: int, chunk_bytes: int) -> None:
        """``page_size``: tokens per page; ``chunk_bytes``: the unit of physical memory."""
        self.page_size = page_size
        self.chunk_bytes = chunk_bytes
        self.page_bytes = spec.kv_bytes_per_token * page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens of one sequence."""
        return -(-tokens // self.page_size)

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
