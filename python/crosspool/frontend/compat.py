"""Lets unmodified SGLang be imported where Triton or torchvision is not installed.

SGLang imports both unconditionally. A CPU-only install has neither: Triton takes a gigabyte, and
PyPI's torchvision cannot be loaded beside a CPU build of torch. :func:`install` puts stand-ins in
the place of the missing ones. The front end never calls anything of either.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGES = ("triton", "torchvision")


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


class _Finder:
    """Finds the ``missing`` packages, and everything beneath them, as stand-ins; its own loader."""

    def __init__(self, missing: Collection[str]) -> None:
        self._missing = missing

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name.partition(".")[0] in self._missing:
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


def install() -> None:
    """Makes ``import sglang`` work in this process; call it before that import. Idempotent.

    Imports torch and transformers, which SGLang does anyway."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:  # all of them are installed, or stand-ins are in place
        return
    # torch and transformers remember whether they found these packages. They must have found them
    # absent before the stand-ins exist.
    from torch.utils._triton import has_triton_package
    from transformers.utils.import_utils import is_torchvision_available, is_triton_available

    has_triton_package()
    is_triton_available()
    if not is_torchvision_available():
        _show_image_processors()
    sys.meta_path.append(_Finder(missing))


def _show_image_processors() -> None:
    """transformers hides AutoImageProcessor where torchvision is missing, although the class needs
    none; SGLang registers classes there while it is imported."""
    module = importlib.import_module("transformers.models.auto.image_processing_auto")
    # That import has put a new module in the place of transformers.
    transformers: Any = sys.modules["transformers"]
    transformers.AutoImageProcessor = module.AutoImageProcessor
