"""How kernels read quantised matrices: codes, and for each group of a row a scale and perhaps an
offset. docs/decisions/0010-formats.md has the reasons.

Which form a matrix is held in follows from how the checkpoint stores it
(:mod:`crosspool.models.schemes`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Codes: TypeAlias = Literal["int4", "uint4", "e2m1", "int8", "e4m3", "int6", "uint6"]
OffsetKind: TypeAlias = Literal["none", "minimum", "zero point"]
ScaleType: TypeAlias = Literal["float16", "bfloat16", "float32"]

_CODE_BITS = {"int4": 4, "uint4": 4, "e2m1": 4, "int6": 6, "uint6": 6, "int8": 8, "e4m3": 8}
_DEPTHS = 8
"""Columns that a line of codes has."""


@dataclass(frozen=True, kw_only=True)
class HeldForm:
    """How kernels read a quantised matrix. An offset is of the scale's type."""

    codes: Codes
    group: int
    """Columns that share a scale, a multiple of 8, and of 16 for codes of 6 bits."""
    scales: ScaleType
    offset: OffsetKind = "none"

    def bytes(self, n: int, k: int) -> int:
        """Bytes of a matrix [n, k] in this form, without the padding of panels."""
        per_group = (4 if self.scales == "float32" else 2) * (1 if self.offset == "none" else 2)
        return n * k * _CODE_BITS[self.codes] // 8 + n * -(-k // self.group) * per_group


def scale_type(dtype: str) -> ScaleType:
    """Returns the type in which scales are held for a model's dtype. Where the kernels round to
    bfloat16, float16 is exact for what most tools write and else errs by less than they do."""
    return "float32" if dtype == "float32" else "float16"


def held_group(group: int | None, k: int) -> int | None:
    """Returns the columns that share a scale in kernels, where ``group`` of ``k`` columns share one
    in the checkpoint (None: all of them); None where kernels cannot have it."""
    if group is None:
        return -(-k // _DEPTHS) * _DEPTHS
    return None if group % _DEPTHS or k % group else group
