"""Prints the folder of NVSHMEM's wheel (nvidia-nvshmem-cu13) in this Python, or an empty
line if it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def folder() -> Path | None:
    """Return ``site-packages/nvidia/nvshmem``, which has include/ and lib/; None if there is
    none."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        if (found := Path(place) / "nvshmem").joinpath("include", "nvshmem.h").is_file():
            return found
    return None


if __name__ == "__main__":
    print(folder() or "")
