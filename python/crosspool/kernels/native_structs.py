"""Mirrors of the structures of ``sgl-kernel-ext/cpu/kernels/arguments.h`` that describe a model's
weights, caches and rules. The header says what the fields mean."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p

BFLOAT16, FLOAT32 = 0, 1
"""Values of ``crosspool::DType``."""
PLAIN, COMPACT, GROUPED = 0, 1, 2
"""Values of ``crosspool::Encoding``."""
CODES = {"int4": 0, "uint4": 1, "e2m1": 2, "int8": 3, "e4m3": 4, "int6": 5, "uint6": 6}
"""Values of ``crosspool::Codes``."""
CODE_BITS = {"int4": 4, "uint4": 4, "e2m1": 4, "int8": 8, "e4m3": 8, "int6": 6, "uint6": 6}
"""Bits of a code."""
OFFSETS = {"none": 0, "minimum": 1, "zero point": 2}
"""Values of ``crosspool::Offset``."""
SCALE_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
"""Values of ``crosspool::ScaleType``."""
SCORES = {"softmax": 0, "sigmoid": 1, "sparsemixer": 2}
"""Values of ``crosspool::Score``."""
GROUP_SCORES = {"max": 0, "top2_sum": 1}
"""Values of ``crosspool::GroupScore``."""
QK_NORMS = {"none": 0, "head": 1, "full": 2, "rotated head": 3, "unweighted rotated head": 3}
"""Values of ``crosspool::QKNorm``."""
KV_DTYPES = {"auto": 0, "fp8_e4m3": 1, "fp8_e5m2": 2}
"""Values of ``crosspool::KVDType``."""
PANEL, DEPTH = 16, 32
"""Columns of a panel, and the multiple to which the depth of a matrix is padded."""


def fields(of: type, names: str) -> Iterator[tuple[str, type]]:
    """Neighbouring fields of one type, for ``_fields_``: ``fields(c_int32, "rows columns")``."""
    return ((name, of) for name in names.split())


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less than ``value``."""
    return -(-value // multiple) * multiple


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *fields(c_int32, "n k dtype encoding"),
        *fields(c_int32, "codes scales group offset"),
    )

    @property
    def bytes(self) -> int:
        """Size of the packed matrix (``crosspool::Matrix::bytes``)."""
        depth = round_up(self.k, DEPTH)
        panels = round_up(self.n, PANEL) // PANEL
        if self.encoding == PLAIN:
            return panels * depth * PANEL * (2 if self.dtype == BFLOAT16 else 4)
        if self.encoding == GROUPED:
            groups: int = -(-self.k // self.group)
            size = 4 if self.scales == SCALE_TYPES["float32"] else 2
            bits = next(CODE_BITS[name] for name, code in CODES.items() if code == self.codes)
            scales = round_up(groups * PANEL * size, 64) * (2 if self.offset else 1)
            return int(panels * (scales + groups * self.group * 2 * bits))
        return panels * (64 * max(3, 1 + depth // 512) + depth * PANEL * 3 // 2)


class Source(ctypes.Structure):
    _fields_ = (("data", c_void_p), *fields(c_int64, "rows row_stride column_stride"))


class CodeSource(ctypes.Structure):
    _fields_ = (
        ("codes", c_void_p),
        *fields(c_int64, "rows stride"),
        *fields(c_void_p, "scales offsets"),
    )


class Router(ctypes.Structure):
    _fields_ = (
        ("bias", c_void_p),
        *fields(c_int32, "experts top_k groups top_groups score group_score renormalize"),
        *fields(c_float, "scale jitter"),
    )


class FFNLayer(ctypes.Structure):
    _fields_ = (
        *fields(POINTER(Matrix), "gate_up down shared_gate_up shared_down"),
        *fields(c_void_p, "gate_up_bias down_bias"),
        *fields(c_int32, "first_expert held top_k"),
        ("swiglu_limit", c_float),
        ("weighs_input", c_int32),
    )


class KVCache(ctypes.Structure):
    _fields_ = (("data", c_void_p), *fields(c_int32, "layers page_size kv_width dtype"))


class Rope(ctypes.Structure):
    _fields_ = (*fields(c_void_p, "cos sin"), *fields(c_int32, "dim interleaved fp32"))


class AttentionShape(ctypes.Structure):
    _fields_ = (
        *fields(c_int32, "q_heads kv_heads qk_dim v_dim v_begin window"),
        ("scale", c_float),
        ("chunked", c_int32),
    )


class Segment(ctypes.Structure):
    _fields_ = (
        ("pages", c_void_p),
        *fields(c_int32, "first_row rows start"),
        ("state", c_void_p),
    )


class DeltaShape(ctypes.Structure):
    _fields_ = tuple(fields(c_int32, "k_heads v_heads k_dim v_dim taps"))


class SamplingRule(ctypes.Structure):
    _fields_ = (
        ("top_p", c_double),
        *fields(c_float, "temperature min_p"),
        ("top_k", c_int32),
    )
