"""The blocks of GGUF: a type is a row that says how many values a block has, and how kernels read
it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crosspool.models.held_forms import Codes, HeldForm, OffsetKind, ScaleType
from crosspool.models.schemes import MXFP4_GROUP, Scheme


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF that consists of blocks."""

    bits: int
    """Bits of a value, without its share of a scale."""
    block: int
    """Values of a block."""
    held: HeldForm
    """How kernels read it."""


def _held(codes: Codes, group: int, offset: OffsetKind = "none") -> HeldForm:
    scales: ScaleType = "bfloat16" if codes == "e2m1" else "float32"
    return HeldForm(codes=codes, group=group, scales=scales, offset=offset)


GGUF_BLOCKS = {
    "Q4_0": BlockType(4, 32, _held("int4", 32)),
    "Q8_0": BlockType(8, 32, _held("int8", 32)),
    "Q4_K": BlockType(4, 256, _held("uint4", 32, "minimum")),
    "Q5_K": BlockType(5, 256, _held("uint6", 32, "minimum")),
    "Q6_K": BlockType(6, 256, _held("int6", 16)),
    "MXFP4": BlockType(4, MXFP4_GROUP, _held("e2m1", MXFP4_GROUP)),
}
"""The types of blocks that are read, by their names. A K-quant's scales of scales are multiplied
out; values of five bits are held with six."""


@dataclass(frozen=True, kw_only=True)
class Blocks(Scheme):
    """The blocks of a type of GGUF, each with scales of its own."""

    type: str
    """Name of the type, one of :data:`GGUF_BLOCKS`."""

    @property
    def format(self) -> str:
        return self.type

    def held(self, k: int, scales: ScaleType) -> HeldForm | None:
        form = GGUF_BLOCKS[self.type].held
        if k % form.group:
            return None
        return form if form.codes == "e2m1" else replace(form, scales=scales)
