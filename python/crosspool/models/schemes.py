"""How checkpoints store quantised matrices: a scheme is a row that says which tensors a matrix
[n, k] consists of, and which of its elements share a scale.

A scheme knows shapes and names, no values; :mod:`crosspool.weightpool.dequantize` turns the tensors
into weights. Which matrices of a model are stored how is a :class:`Quantization`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from crosspool.models.held_forms import Codes, HeldForm, OffsetKind, ScaleType, held_group

Shape: TypeAlias = tuple[int, ...]

_FLOATS = ("F32", "BF16", "F16")
_EXPONENTS = ("U8", "F8_E8M0")
_WORD_BITS = 32
MXFP4_GROUP = 32
"""Weights of MXFP4 that share an exponent (OCP Microscaling Formats 1.0)."""


@dataclass(frozen=True)
class StoredTensor:
    """One of the tensors of which a matrix consists."""

    names: tuple[str, ...]
    """Names that it may have in a checkpoint."""
    shapes: tuple[Shape, ...]
    """Shapes that it may have."""
    dtypes: tuple[str, ...]
    """Dtypes that it may have, as safetensors names them."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A place in a tensor that holds a matrix, or a vector, of every expert of a layer: vectors as
    [experts, height], quantised matrices as [experts, height, ...], matrices of floats as
    [experts, height, k], or as [experts, k, height] where ``rows_last``."""

    index: int
    """The expert."""
    count: int
    """Number of experts."""
    first: int = 0
    """Row of the stored matrix that is row 0 of this one."""
    step: int = 1
    """Rows of the stored matrix from one row of this one to the next: 2 where gate and up
    alternate."""
    height: int
    """Rows of the stored matrix."""
    rows_last: bool = False

    def floats(self, shape: Shape) -> Shape:
        """Returns the shape of the tensor in which a matrix [n, k] of floats, or a vector [n],
        lies."""
        rest = shape[1:]
        return (
            (self.count, *rest, self.height) if self.rows_last else (self.count, self.height, *rest)
        )

    def within(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Returns where a part of a matrix of floats, or of a vector, lies in that tensor."""
        rows, columns = self.rows(index[0]), index[1:]
        stored = (*columns, rows) if self.rows_last else (rows, *columns)
        return (slice(self.index, self.index + 1), *stored)

    def rows(self, part: slice) -> slice:
        """Returns where rows of the matrix lie among those that are stored."""
        begin, end = (self.first + row * self.step for row in (part.start, part.stop))
        return slice(begin, end, self.step)


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` to ``first + count`` of the tensor ``name``, which has ``height`` rows."""

    name: str
    height: int
    first: int
    count: int


@dataclass(frozen=True)
class Joined:
    """A matrix of floats of rows that lie in several tensors, or several places of one. Each part
    is cut into ``groups`` runs of rows; the matrix has the first run of every part, then the second
    of every part, and so on."""

    groups: int
    parts: tuple[RowRange, ...]


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """One way to store a matrix."""

    bits: int
    """Bits of a value, without its share of a scale."""
    block: tuple[int | None, int | None]
    """Rows and columns that share a scale; None: all of them."""

    @property
    @abstractmethod
    def format(self) -> str:
        """The format of the values: ``fp8``, ``int8``, ``int4``, ``mxfp4`` or a type of GGUF."""

    @property
    def stacks(self) -> bool:
        """Whether one tensor may hold the matrices of all experts of a layer."""
        return False

    @property
    def unit(self) -> tuple[int, int]:
        """Multiples at which rows and columns can be cut, so that no block is."""
        return self.block[0] or 1, self.block[1] or 1

    def wrong_shape(self, n: int, k: int) -> str | None:
        """Returns why a matrix [n, k] cannot be stored so, or None."""
        group = self.block[1]
        if group is not None and k % group:
            return f"groups of {group} do not divide its {k} columns"
        return None

    def held(self, k: int, scales: ScaleType) -> HeldForm | None:
        """Returns how kernels read ``k`` columns of the matrix as they are stored; None where they
        need floats. ``scales``: their type, as
        :func:`~crosspool.models.held_forms.scale_type` gives it."""
        return None


@dataclass(frozen=True, kw_only=True)
class Stored(Scheme):
    """One way to store a matrix as tensors of safetensors."""

    @abstractmethod
    def stored(
        self, module: str, n: int, k: int, stack: Stack | None = None
    ) -> dict[str, StoredTensor]:
        """Returns the tensors of a matrix by their roles: ``weight``, ``scale``, and ``zeros`` and
        ``groups`` where the scheme has them. ``module``: the name of what they belong to, such as
        ``model.layers.0.self_attn.q_proj``."""


@dataclass(frozen=True, kw_only=True)
class Elements(Stored):
    """A byte for each weight, and scales for blocks of them: FP8 in blocks, per channel or per
    tensor, and int8 of compressed-tensors. A weight is (value - zero point) * scale."""

    bits: Literal[8] = 8
    values: Literal["fp8", "int8"]
    symmetric: bool = True
    scales: tuple[str, ...] = ("weight_scale",)
    """Names that the scales may have."""

    @property
    def format(self) -> str:
        return self.values

    def wrong_shape(self, n: int, k: int) -> str | None:
        return None  # blocks at the borders may be smaller

    def held(self, k: int, scales: ScaleType) -> HeldForm | None:
        group = held_group(self.block[1], k)
        if group is None:
            return None
        if self.values == "fp8":  # scales are that small that float16 would have few bits of them
            return HeldForm(codes="e4m3", group=group, scales="float32")
        if self.block[1] is None:
            scales = "float32"
        offset: OffsetKind = "none" if self.symmetric else "zero point"
        return HeldForm(codes="int8", group=group, scales=scales, offset=offset)

    def stored(
        self, module: str, n: int, k: int, stack: Stack | None = None
    ) -> dict[str, StoredTensor]:
        rows, columns = self.grid(n, k)
        shapes: tuple[Shape, ...] = ((rows, columns),)
        if self.block[1] is None:
            shapes += ((rows,),) if self.block[0] else ((1,), ())
        dtype = "F8_E4M3" if self.values == "fp8" else "I8"
        names = tuple(f"{module}.{scale}" for scale in self.scales)
        found = {
            "weight": StoredTensor((f"{module}.weight",), ((n, k),), (dtype,)),
            "scale": StoredTensor(names, shapes, (*_FLOATS, "F8_E8M0")),
        }
        if not self.symmetric:
            found["zeros"] = StoredTensor((f"{module}.weight_zero_point",), shapes, ("I8",))
        return found

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """Number of blocks along the rows and the columns of a matrix."""
        rows, columns = self.block
        return -(-n // (rows or n)), -(-k // (columns or k))


@dataclass(frozen=True, kw_only=True)
class _Integers(Stored):
    """Integers in int32 words. A weight is (value - zero point) * scale."""

    act_order: bool = False
    """Whether a tensor says which group each column belongs to."""

    @property
    def format(self) -> str:
        return f"int{self.bits}"

    @property
    def per_word(self) -> int:
        """Values of a word."""
        return _WORD_BITS // self.bits

    @property
    def unit(self) -> tuple[int, int]:
        return 1, 1 if self.act_order else self.block[1] or 1

    def held(self, k: int, scales: ScaleType) -> HeldForm | None:
        group = held_group(self.block[1], k)
        if self.act_order or group is None:
            return None
        if self.block[1] is None:
            scales = "float32"
        codes: Codes = "uint4" if self.bits == 4 else "int8"
        return HeldForm(codes=codes, group=group, scales=scales, offset="zero point")

    def _groups(self, k: int) -> int:
        return k // (self.block[1] or k)


@dataclass(frozen=True, kw_only=True)
class PackedWords(_Integers):
    """compressed-tensors' ``pack-quantized``: words along k, the first value in the lowest bits,
    each raised by half its range; zero points likewise along n."""

    symmetric: bool = True

    def held(self, k: int, scales: ScaleType) -> HeldForm | None:
        form = super().held(k, scales)
        if form is None or not self.symmetric:
            return form
        return replace(form, codes="int4" if self.bits == 4 else "int8", offset="none")

    def stored(
        self, module: str, n: int, k: int, stack: Stack | None = None
    ) -> dict[str, StoredTensor]:
        groups = self._groups(k)
        packed = (n, -(-k // self.per_word))
        found = {
            "weight": StoredTensor((f"{module}.weight_packed",), (packed,), ("I32",)),
            "scale": StoredTensor((f"{module}.weight_scale",), ((n, groups),), _FLOATS),
        }
        if not self.symmetric:
            zeros = (-(-n // self.per_word), groups)
            found["zeros"] = StoredTensor((f"{module}.weight_zero_point",), (zeros,), ("I32",))
        if self.act_order:
            index = StoredTensor((f"{module}.weight_g_idx",), ((k,),), ("I32", "I64"))
            found["groups"] = index
        return found


@dataclass(frozen=True, kw_only=True)
class GPTQ(_Integers):
    """GPTQ: the matrix is transposed, with words along k, the first value in the lowest bits, and
    zero points likewise along n."""

    zeros_less_one: bool = True
    """Whether packed zero points are one less than they mean (format ``gptq``, not
    ``gptq_v2``)."""

    def wrong_shape(self, n: int, k: int) -> str | None:
        if k % self.per_word or n % self.per_word:
            return f"words of {self.per_word} values do not divide [{n}, {k}]"
        return super().wrong_shape(n, k)

    def stored(
        self, module: str, n: int, k: int, stack: Stack | None = None
    ) -> dict[str, StoredTensor]:
        groups, per_word = self._groups(k), self.per_word
        found = {
            "weight": StoredTensor((f"{module}.qweight",), ((k // per_word, n),), ("I32",)),
            "zeros": StoredTensor((f"{module}.qzeros",), ((groups, n // per_word),), ("I32",)),
            "scale": StoredTensor((f"{module}.scales",), ((groups, n),), _FLOATS),
        }
        if self.act_order:
            found["groups"] = StoredTensor((f"{module}.g_idx",), ((k,),), ("I32",))
        return found


@dataclass(frozen=True, kw_only=True)
class AWQ(_Integers):
    """AWQ's ``gemm``: the matrix is transposed, with words along n whose values are those of the
    columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on; zero points likewise."""

    def wrong_shape(self, n: int, k: int) -> str | None:
        if n % self.per_word:
            return f"words of {self.per_word} values do not divide its {n} rows"
        return super().wrong_shape(n, k)

    def stored(
        self, module: str, n: int, k: int, stack: Stack | None = None
    ) -> dict[str, StoredTensor]:
        groups, words = self._groups(k), n // self.per_word
        return {
            "weight": StoredTensor((f"{module}.qweight",), ((k, words),), ("I32",)),
            "zeros": StoredTensor((f"{module}.qzeros",), ((groups, words),), ("I32",)),
            "scale": StoredTensor((f"{module}.scales",), ((groups, n),), _FLOATS),
        }


@dataclass(frozen=True, kw_only=True)
class MXFP4(Stored):
    """MXFP4: two values of e2m1 in a byte, the first in the lower half, and an exponent of two for
    each 32 of a row (OCP Microscaling Formats 1.0). compressed-tensors names the tensors of each
    matrix; gpt-oss has tensors for all experts of a layer, whose rows are cut into groups."""

    bits: Literal[4] = 4
    block: tuple[int | None, int | None] = (1, MXFP4_GROUP)

    @property
    def format(self) -> str:
        return "mxfp4"

    @property
    def stacks(self) -> bool:
        return True

    def held(self, k: int, scales: ScaleType) -> HeldForm | None:
        if k % MXFP4_GROUP:
            return None
        return HeldForm(codes="e2m1", group=MXFP4_GROUP, scales="bfloat16")

    def stored(
        self, module: str, n: int, k: int, stack: Stack | None = None
    ) -> dict[str, StoredTensor]:
        groups = k // MXFP4_GROUP
        if stack is None:
            weight = StoredTensor((f"{module}.weight_packed",), ((n, k // 2),), ("U8",))
            scale = StoredTensor((f"{module}.weight_scale",), ((n, groups),), _EXPONENTS)
            return {"weight": weight, "scale": scale}
        stacked = (stack.count, stack.height, groups)
        blocks = (*stacked, MXFP4_GROUP // 2)
        return {
            "weight": StoredTensor((f"{module}_blocks",), (blocks,), ("U8",)),
            "scale": StoredTensor((f"{module}_scales",), (stacked,), _EXPONENTS),
        }


@dataclass(frozen=True, kw_only=True)
class Rounded(Stored):
    """Floats, which are rounded to the nearest values when they are read: integers of 4 bits in
    groups with zero points, integers or floats of 8 bits with a scale for each row."""

    values: Literal["int4", "int8", "fp8"]

    @property
    def format(self) -> str:
        return self.values

    def held(self, k: int, scales: ScaleType) -> HeldForm | None:
        group = held_group(self.block[1], k)
        if group is None:
            return None
        if self.values == "int4":
            return HeldForm(codes="uint4", group=group, scales=scales, offset="zero point")
        codes: Codes = "int8" if self.values == "int8" else "e4m3"
        return HeldForm(codes=codes, group=group, scales="float32")

    def stored(
        self, module: str, n: int, k: int, stack: Stack | None = None
    ) -> dict[str, StoredTensor]:
        return {"weight": StoredTensor((f"{module}.weight",), ((n, k),), _FLOATS)}


ROUNDED = {
    "int4": Rounded(bits=4, block=(1, 32), values="int4"),
    "int8": Rounded(bits=8, block=(1, None), values="int8"),
    "fp8": Rounded(bits=8, block=(1, None), values="fp8"),
}
"""The formats to which a checkpoint of floats can be rounded, by their names."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """A set of modules by their names in the checkpoint, which end before the tensors' own names
    (``model.layers.0.self_attn.q_proj``)."""

    modules: frozenset[str] = frozenset()
    """Whole names."""
    pattern: re.Pattern[str] | None = None
    """Matches names from their beginning."""
    ends: tuple[str, ...] = ()
    """Endings of names."""

    def __contains__(self, name: str) -> bool:
        matches = self.pattern is not None and self.pattern.match(name) is not None
        return matches or name in self.modules or name.endswith(self.ends)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which matrices of a model are stored quantised, and how. Embeddings, routers, norms and
    biases never are."""

    method: str
    """``quant_method`` of the config, such as ``fp8`` or ``gptq``, or ``gguf``."""
    schemes: tuple[tuple[Names | None, Scheme], ...]
    """Schemes and the modules that have them, the first that fits; None: all modules."""
    plain: Names
    """Modules that are not quantised."""
    head: bool = False
    """Whether the LM head is quantised, unless it is among the plain modules."""

    @property
    def cut_unit(self) -> int:
        """Multiple at which rows and columns can be cut, so that no block of any scheme is."""
        return math.lcm(*(unit for _, scheme in self.schemes for unit in scheme.unit))

    def scheme(self, module: str, *, head: bool) -> Scheme | None:
        """Returns how a matrix is stored; None: unquantised. ``head``: it is the LM head."""
        if (head and not self.head) or module in self.plain:
            return None
        for names, scheme in self.schemes:
            if names is None or module in names:
                return scheme
        return None
