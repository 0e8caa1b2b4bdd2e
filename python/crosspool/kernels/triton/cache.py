"""The KV cache of a model as kernels take it: by its address.

Triton's launcher asks the driver about every tensor argument, and refuses memory that is not
mapped. A stage is captured while no chunk of the cache is mapped, so kernels get the address as a
number, about which nobody is asked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ALIGNMENT = 16
"""Bytes of the widest load of a thread."""


def address_of(kv: torch.Tensor) -> int:
    """Returns the address of ``kv`` [pages, layers, page_size, kv_width], of which nothing need be
    mapped.

    Raises ValueError when it is not contiguous, or not aligned to 16 bytes."""
    if not kv.is_contiguous() or kv.data_ptr() % _ALIGNMENT:
        raise ValueError(f"a KV cache is not contiguous or not aligned to {_ALIGNMENT} bytes")
    return kv.data_ptr()


@triton.jit
def cache_at(address: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Returns the cache at an address, which is a multiple of 16 bytes, as a pointer."""
    # Triton's interpreter takes a small number, such as an address in a low heap, for 32 bits.
    return tl.multiple_of(address.to(tl.int64).to(tl.pointer_type(DTYPE)), 16)
