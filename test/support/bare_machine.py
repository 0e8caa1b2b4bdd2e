"""A pytest plugin (``-p support.bare_machine``): a GPU machine that has torch, Triton, NumPy,
transformers, cuda-bindings and pytest, and none of the server's other dependencies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HIDDEN = {"msgspec", "zmq", "sglang", "flashinfer", "setproctitle", "fastapi", "uvicorn", "openai"}


class _Hide(MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        del path, target
        if fullname.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {fullname!r} (hidden)", name=fullname)
        return None


sys.meta_path.insert(0, _Hide())
