"""Programs of one launch that add up what all of them found."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last_to_arrive(arrivals: tl.tensor, programs: tl.tensor) -> tl.tensor:
    """Whether this program is the last of ``programs`` to call; each calls once.

    ``arrivals``: their counter, int32, 0 before and after a launch. The last program may read what
    the others stored before they called, by loads with the modifier ".cg", since an L1 cache may
    hold older values."""
    tl.debug_barrier()  # one thread arrives for all threads, after the stores of all
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1
    if is_last:
        tl.store(arrivals, 0)
    return is_last
