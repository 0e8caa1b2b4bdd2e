"""The compiled kernels of the bundle for a GPU machine."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_bundle_parts import Bundle


def compiled_kernels(bundle: Bundle, interpreter: str | None, models: Sequence[str] | None) -> None:
    bundle.left_out["kernels"] = "soon"
