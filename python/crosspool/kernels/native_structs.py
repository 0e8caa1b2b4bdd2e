"""The structures of ``sgl-kernel-ext/cpu/kernels/arguments.h``, field by field; it says what they
mean. :mod:`crosspool.kernels.native_kernels` is their face for tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_float, c_int32, c_int64, c_void_p

ISAS = ("portable", "avx2", "avx512", "amx")
"""In the order of ``crosspool::Isa``."""
BFLOAT16, FLOAT32 = 0, 1
PLAIN, COMPACT = 0, 1
"""crosspool::Encoding."""
PANEL, DEPTH = 16, 32


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("dtype", c_int32),
        ("encoding", c_int32),
    )

    @property
    def bytes(self) -> int:
        """``crosspool::Matrix::bytes``."""
        depth = _up(self.k, DEPTH)
        panels = _up(self.n, PANEL) // PANEL
        if self.encoding == PLAIN:
            return panels * depth * PANEL * (2 if self.dtype == BFLOAT16 else 4)
        return panels * (64 * max(3, 1 + depth // 512) + depth * PANEL * 3 // 2)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class Source(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
    )


class Rows(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64), ("index", c_void_p))


class Gemm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.POINTER(Matrix)),
        ("bias", c_void_p),
        ("x", Rows),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("rows", c_int32),
        ("store", c_int32),
    )


class Router(ctypes.Structure):
    _fields_ = (
        ("bias", c_void_p),
        ("experts", c_int32),
        ("top_k", c_int32),
        ("groups", c_int32),
        ("top_groups", c_int32),
        ("score", c_int32),
        ("group_score", c_int32),
        ("renormalize", c_int32),
        ("scale", c_float),
    )


class FFNLayer(ctypes.Structure):
    _fields_ = (
        ("gate_up", ctypes.POINTER(Matrix)),
        ("down", ctypes.POINTER(Matrix)),
        ("shared_gate_up", ctypes.POINTER(Matrix)),
        ("shared_down", ctypes.POINTER(Matrix)),
        ("first_expert", c_int32),
        ("held", c_int32),
        ("top_k", c_int32),
    )


class ExpertGroup(ctypes.Structure):
    _fields_ = (
        ("gate_up", ctypes.POINTER(Matrix)),
        ("down", ctypes.POINTER(Matrix)),
        ("first_slot", c_int32),
        ("slots", c_int32),
    )


class ExpertPlan(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.POINTER(ExpertGroup)),
        ("slot_row", c_void_p),
        ("slot_weight", c_void_p),
        ("group_count", c_int32),
        ("slot_count", c_int32),
    )


class Experts(ctypes.Structure):
    _fields_ = (
        ("plan", ctypes.POINTER(ExpertPlan)),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("activation", c_void_p),
        ("activation_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("rows", c_int32),
    )


class KVCache(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("layers", c_int32),
        ("page_size", c_int32),
        ("kv_width", c_int32),
    )


class RowPlace(ctypes.Structure):
    _fields_ = (("position", c_int32), ("page", c_int32), ("offset", c_int32))


class Rope(ctypes.Structure):
    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("dim", c_int32),
        ("interleaved", c_int32),
        ("fp32", c_int32),
    )


class GQAPrepare(ctypes.Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("places", ctypes.POINTER(RowPlace)),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("kv", KVCache),
        ("rope", Rope),
        ("layer", c_int32),
        ("q_heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("qk_norm", c_int32),
        ("eps", c_float),
        ("clip", c_float),
    )


class MLAAppend(ctypes.Structure):
    _fields_ = (
        ("compressed", c_void_p),
        ("compressed_stride", c_int64),
        ("norm", c_void_p),
        ("places", ctypes.POINTER(RowPlace)),
        ("kv", KVCache),
        ("rope", Rope),
        ("layer", c_int32),
        ("latent", c_int32),
        ("eps", c_float),
    )


class Rotate(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("x_head_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("out_head_stride", c_int64),
        ("places", ctypes.POINTER(RowPlace)),
        ("rope", Rope),
        ("heads", c_int32),
    )


class AttentionShape(ctypes.Structure):
    _fields_ = (
        ("q_heads", c_int32),
        ("kv_heads", c_int32),
        ("qk_dim", c_int32),
        ("v_dim", c_int32),
        ("v_begin", c_int32),
        ("window", c_int32),
        ("scale", c_float),
    )


class Segment(ctypes.Structure):
    _fields_ = (
        ("pages", c_void_p),
        ("first_row", c_int32),
        ("rows", c_int32),
        ("start", c_int32),
    )


class AttentionTask(ctypes.Structure):
    _fields_ = (
        ("segment", c_int32),
        ("row_begin", c_int32),
        ("row_end", c_int32),
        ("head_begin", c_int32),
        ("head_end", c_int32),
        ("key_begin", c_int32),
        ("key_end", c_int32),
        ("split", c_int32),
        ("splits", c_int32),
        ("arrival", c_int32),
        ("partial", c_int64),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("shape", ctypes.POINTER(AttentionShape)),
        ("segments", ctypes.POINTER(Segment)),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("partials", c_void_p),
        ("arrivals", c_void_p),
        ("kv", KVCache),
        ("layer", c_int32),
    )


class Best(ctypes.Structure):
    _fields_ = (("value", c_float), ("index", c_int32))


class SamplingRule(ctypes.Structure):
    _fields_ = (
        ("top_p", c_double),
        ("temperature", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
    )


class Limits(ctypes.Structure):
    _fields_ = (
        ("k", c_int32),
        ("qk_dim", c_int32),
        ("v_dim", c_int32),
        ("experts", c_int32),
        ("vocab", c_int32),
    )


def _function(*arguments: type, result: type | None = None) -> type:
    return ctypes.CFUNCTYPE(result, *arguments)


def _pointer(structure: type) -> type:
    return ctypes.POINTER(structure)


class Kernels(ctypes.Structure):
    _fields_ = (
        ("scratch_bytes", _function(_pointer(Limits), result=c_int64)),
        ("compact", c_int32),
        (
            "pack",
            _function(_pointer(Matrix), _pointer(Source), c_int32, c_int32, c_int32, result=c_bool),
        ),
        (
            "pack_gated",
            _function(
                _pointer(Matrix),
                _pointer(Source),
                _pointer(Source),
                c_int32,
                c_int32,
                result=c_bool,
            ),
        ),
        ("gemm", _function(_pointer(Gemm), c_int32, c_int32, c_void_p)),
        (
            "rms_norm",
            _function(
                c_void_p,
                c_int64,
                c_void_p,
                c_int32,
                c_float,
                c_void_p,
                c_int64,
                c_int32,
                c_int32,
            ),
        ),
        ("add", _function(c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int32, c_int32)),
        ("add_model", _function(c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int32, c_int32)),
        ("to_float", _function(c_void_p, c_void_p, c_int64)),
        ("from_float", _function(c_void_p, c_void_p, c_int64)),
        ("embed", _function(c_void_p, c_int32, c_void_p, c_void_p, c_int64, c_int32, c_int32)),
        (
            "embed_packed",
            _function(_pointer(Matrix), c_void_p, c_void_p, c_int64, c_int32, c_int32),
        ),
        (
            "route",
            _function(
                _pointer(Router),
                c_void_p,
                c_int64,
                c_void_p,
                c_void_p,
                c_int32,
                c_int32,
                c_void_p,
            ),
        ),
        (
            "plan_experts",
            _function(
                _pointer(FFNLayer), c_void_p, c_void_p, c_int32, _pointer(ExpertPlan), c_void_p
            ),
        ),
        ("expert_gate_up", _function(_pointer(Experts), c_int32, c_int32, c_void_p)),
        ("expert_down", _function(_pointer(Experts), c_int32, c_int32, c_void_p)),
        ("gqa_prepare", _function(_pointer(GQAPrepare), c_int32, c_int32, c_int32, c_int32)),
        ("mla_append", _function(_pointer(MLAAppend), c_int32, c_int32)),
        ("rotate", _function(_pointer(Rotate), c_int32, c_int32, c_int32, c_int32)),
        ("attend", _function(_pointer(Attention), _pointer(AttentionTask), c_int32, c_void_p)),
        ("argmax", _function(c_void_p, c_int32, _pointer(Best))),
        (
            "sample",
            _function(
                c_void_p, c_int32, _pointer(SamplingRule), c_double, c_void_p, result=c_int32
            ),
        ),
    )


SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "crosspool_isa": (c_int32, ()),
    "crosspool_kernels": (_pointer(Kernels), (c_int32, c_int32)),
    "crosspool_uniform": (c_double, (ctypes.c_uint64, ctypes.c_uint64)),
    "crosspool_attention_plan": (
        c_void_p,
        (_pointer(AttentionShape), _pointer(Segment), c_int32, c_int32),
    ),
    "crosspool_attention_plan_tasks": (
        _pointer(AttentionTask),
        (
            c_void_p,
            c_int32,
            _pointer(c_int32),
            _pointer(c_void_p),
            _pointer(c_void_p),
        ),
    ),
    "crosspool_attention_plan_free": (None, (c_void_p,)),
}
"""What the library exports beside :mod:`crosspool.kernels.native`'s functions."""
