"""A thread's sign that it goes on while torch computes for it, as ``cpu/kernels/advance.h`` has it
for native code."""

from __future__ import annotations

from collections.abc import Callable

_count: Callable[[], None] | None = None


def count_advances(count: Callable[[], None] | None) -> None:
    """Has :func:`advance` call ``count``; None, as at first: nothing."""
    global _count  # noqa: PLW0603 - a device process has one
    _count = count


def advance() -> None:
    """Counts. Whatever may take long calls it again and again within: products of matrices,
    attention, the sorting of probabilities."""
    if _count is not None:
        _count()
