"""Lets unmodified SGLang be imported where there is no CUDA.

SGLang imports triton and torchvision unconditionally. On a CPU-only install triton is absent, and
torchvision's wheel, built for CUDA, cannot load its operators and then fails on their missing
schemas. :func:`install` puts a stand-in for the first and declares the second's schemas; where
the real ones work it changes nothing. No kernel of either is ever run by the front end.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep_alive: list[Any] = []
"""Operator libraries: their schemas go when they are collected."""


class _Named:
    """Base of the stand-in's classes: anything may construct them or derive from them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs


class _StandIn(ModuleType):
    """A module of which every name exists: capitalised ones are classes, others are modules.

    Called, it is a decorator that leaves its function alone (``@triton.jit``,
    ``@triton.autotune(...)``)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[0].isupper():
            value = type(name, (_Named,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function

    def __bool__(self) -> bool:
        return False


class _TritonFinder:
    """Finds ``triton`` and everything beneath it as stand-ins; its own loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name == "triton" or name.startswith("triton."):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "triton":
            module.__dict__.update(
                __version__="0.0.0",
                cdiv=lambda a, b: -(a // -b),
                next_power_of_2=lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
            )


def _stand_in_for_triton() -> None:
    if importlib.util.find_spec("triton") is not None:
        return
    # torch and transformers must have found triton absent before the stand-in exists: both
    # remember it.
    from torch.utils._triton import has_triton_package
    from transformers.utils.import_utils import is_triton_available

    has_triton_package()
    is_triton_available()
    sys.meta_path.append(_TritonFinder())


def _declare_torchvision_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules or _keep_alive:
        return
    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in _TORCHVISION_SCHEMAS:
            library.define(schema)
        _keep_alive.append(library)


def install() -> None:
    """Makes ``import sglang`` work in this process; call it before that import. Idempotent.

    Imports torch and transformers, which SGLang does anyway."""
    if _TritonFinder.__name__ in {type(finder).__name__ for finder in sys.meta_path}:
        return
    _declare_torchvision_operators()
    _stand_in_for_triton()
