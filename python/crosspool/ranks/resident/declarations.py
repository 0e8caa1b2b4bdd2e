"""What a part of a model declares that it needs of a checkpoint, before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosspool.models.held_forms import HeldForm
from crosspool.models.spec import TensorRef
from crosspool.ranks.weights import TensorListing
from crosspool.weightpool.dequantize import Coded

BEFORE_ALL = -1
"""The stage of what must be there before any layer."""

Index = tuple[slice, ...]
Pack = Callable[[list[Tensor]], object]
PackCodes = Callable[[list[Coded]], object]


@dataclass(frozen=True)
class Declaration:
    """Tensors, or shares of them, and the function that takes them when all have been read."""

    layer: int | None
    parts: list[tuple[TensorRef, Index]]
    dtype: torch.dtype
    finish: Pack
    on_demand: bool = False
    """Whether they are no part of what is in memory with the model."""
    form: HeldForm | None = None
    """The form in which the parts are read, of a matrix that is held as codes."""
    finish_codes: PackCodes | None = None

    def take(self, parts: list[Any]) -> None:
        """Takes the tensors, or codes, when all have been read."""
        if self.form is None:
            self.finish(parts)
        else:
            assert self.finish_codes is not None
            self.finish_codes(parts)

    @property
    def held_as(self) -> str:
        """The dtype, or the codes, as which they are held."""
        return str(self.dtype).removeprefix("torch.") if self.form is None else self.form.codes

    def listings(self) -> list[TensorListing]:
        """Lists the tensors by the checkpoint's names, with their shapes and bytes as held."""
        return [self._listing(ref, shape_of(index)) for ref, index in self.parts]

    def _listing(self, ref: TensorRef, shape: tuple[int, ...]) -> TensorListing:
        return TensorListing(
            layer=self.layer,
            key=ref.key,
            name=ref.name,
            shape=shape,
            dtype=self.held_as,
            bytes=torch.Size(shape).numel() * self.dtype.itemsize
            if self.form is None
            else self.form.bytes(shape[0], shape[1]),
        )


def whole(ref: TensorRef) -> Index:
    """The index of a whole tensor."""
    return tuple(slice(0, size) for size in ref.shape)


def shape_of(index: Index) -> tuple[int, ...]:
    """The shape of a share."""
    return tuple(part.stop - part.start for part in index)


def bounds(index: Index) -> list[tuple[int, int]]:
    """The first row, column, ... of a share, and the one behind its last."""
    return [(part.start, part.stop) for part in index]


def stage_of(layer: int | None) -> int:
    """The stage of what ``layer`` needs; None: all layers need it."""
    return 0 if layer is None else layer
