"""Kernels of few programs, for Triton's interpreter runs them one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from crosspool.kernels.triton import attention, experts, linear, tiles


def use_few_programs(replace: Callable[[Any, str, Any], None]) -> None:
    """Has products cut into tiles of many columns, and keys and products split among few programs.
    ``replace`` is ``setattr``, or a monkeypatch's."""

    def wide_tile(*arguments: Any, **named: Any) -> tiles.Tile:
        return dataclasses.replace(tiles.product_tile(*arguments, **named), columns=64)

    for kernels in (experts, linear):
        replace(kernels, "product_tile", wide_tile)
    for kernels in (attention, linear):
        replace(kernels, "MULTIPROCESSORS", 4)
