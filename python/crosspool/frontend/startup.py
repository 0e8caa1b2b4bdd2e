"""Imported by ``crosspool.pth`` when Python starts in an environment that has CrossPool.

So that ``python -m sglang.bench_serving`` and programs in SGLang's DSL work on a CPU-only install,
the first import of sglang installs :mod:`crosspool.frontend.compat`. Until then this costs one
comparison per imported module, and nothing heavy is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType


class _SGLangImport:
    """Finds nothing; sees the first import of sglang and prepares the process for it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        del path, target
        if name == "sglang":
            sys.meta_path.remove(self)
            from crosspool.frontend import compat

            compat.install()


def watch() -> None:
    """Puts the watcher in front of Python's own finders. Idempotent."""
    if not any(isinstance(finder, _SGLangImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SGLangImport())
