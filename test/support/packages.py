"""What is installed beside what CrossPool needs."""

from __future__ import annotations

import importlib.metadata


def installed(package: str) -> bool:
    """Whether a distribution of this name is; stand-ins of compat are none."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
