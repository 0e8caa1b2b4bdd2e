"""Mirrors of what ``sgl-kernel-ext/cpu/kernels/`` passes to a kernel, and of the table of kernels.
The headers say what the fields mean; :mod:`support.native_kernels` calls the kernels with them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

from crosspool.kernels import native_structs as ns
from crosspool.kernels.native import Signatures
from crosspool.kernels.native_structs import fields


class Rows(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64), ("index", c_void_p))


class Gemm(ctypes.Structure):
    _fields_ = (
        ("weight", POINTER(ns.Matrix)),
        ("bias", c_void_p),
        ("x", Rows),
        ("out", c_void_p),
        ("out_stride", c_int64),
        *fields(c_int32, "rows store"),
    )


class ExpertGroup(ctypes.Structure):
    _fields_ = (
        *fields(POINTER(ns.Matrix), "gate_up down"),
        *fields(c_void_p, "gate_up_bias down_bias"),
        ("swiglu_limit", c_float),
        *fields(c_int32, "first_slot slots"),
    )


class ExpertPlan(ctypes.Structure):
    _fields_ = (
        ("groups", POINTER(ExpertGroup)),
        *fields(c_void_p, "slot_row slot_weight"),
        *fields(c_int32, "group_count slot_count"),
    )


class Experts(ctypes.Structure):
    _fields_ = (
        ("plan", POINTER(ExpertPlan)),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("activation", c_void_p),
        ("activation_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        *fields(c_int32, "rows by_slot"),
    )


class RowPlace(ctypes.Structure):
    _fields_ = tuple(fields(c_int32, "position page offset"))


class GQAPrepare(ctypes.Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        *fields(c_void_p, "q_norm k_norm"),
        ("places", POINTER(RowPlace)),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("kv", ns.KVCache),
        ("rope", ns.Rope),
        *fields(c_int32, "layer q_heads kv_heads head_dim qk_norm"),
        *fields(c_float, "eps clip"),
        ("gated", c_int32),
        ("factors", c_void_p),
    )


class HeadGates(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("gates", c_void_p),
        *fields(c_int64, "gates_stride gates_step"),
        ("dim", c_int32),
    )


class DeltaNet(ctypes.Structure):
    _fields_ = (
        ("shape", POINTER(ns.DeltaShape)),
        ("segments", POINTER(ns.Segment)),
        *fields(c_int32, "segment_count layer"),
        ("qkvz", c_void_p),
        ("qkvz_stride", c_int64),
        ("rates", c_void_p),
        ("rates_stride", c_int64),
        *fields(c_void_p, "taps decay decay_bias out_norm"),
        ("eps", c_float),
        ("kv", ns.KVCache),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class MLAAppend(ctypes.Structure):
    _fields_ = (
        ("compressed", c_void_p),
        ("compressed_stride", c_int64),
        ("norm", c_void_p),
        ("places", POINTER(RowPlace)),
        ("kv", ns.KVCache),
        ("rope", ns.Rope),
        *fields(c_int32, "layer latent"),
        ("eps", c_float),
    )


class Rotate(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        *fields(c_int64, "x_stride x_head_stride"),
        ("out", c_void_p),
        *fields(c_int64, "out_stride out_head_stride"),
        ("places", POINTER(RowPlace)),
        ("rope", ns.Rope),
        ("heads", c_int32),
    )


class AttentionTask(ctypes.Structure):
    _fields_ = (
        *fields(c_int32, "segment row_begin row_end head_begin head_end key_begin key_end"),
        *fields(c_int32, "range ranges splits arrival"),
        ("partial", c_int64),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("shape", POINTER(ns.AttentionShape)),
        ("segments", POINTER(ns.Segment)),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        *fields(c_void_p, "partials arrivals"),
        ("kv", ns.KVCache),
        ("layer", c_int32),
        ("sinks", c_void_p),
    )


class Best(ctypes.Structure):
    _fields_ = (("value", c_float), ("index", c_int32))


class Limits(ctypes.Structure):
    _fields_ = tuple(fields(c_int32, "k qk_dim v_dim experts vocab delta_k_dim delta_inputs"))


def _function(*takes: type, result: type | None = None) -> type:
    """A pointer to a function that takes structures by reference."""
    by_reference: list[Any] = [
        POINTER(one) if issubclass(one, ctypes.Structure) else one for one in takes
    ]
    return ctypes.CFUNCTYPE(result, *by_reference)


_Range = (c_int32, c_int32)
_Array = (c_void_p, c_int64)
"""An array of rows and its stride."""


class Kernels(ctypes.Structure):
    _fields_ = (
        ("scratch_bytes", _function(Limits, result=c_int64)),
        ("compact", c_int32),
        ("pack", _function(ns.Matrix, ns.Source, c_int32, *_Range, result=c_bool)),
        ("pack_gated", _function(ns.Matrix, ns.Source, ns.Source, *_Range, result=c_bool)),
        ("pack_grouped", _function(ns.Matrix, ns.CodeSource, *_Range)),
        ("gemm", _function(Gemm, *_Range, c_void_p)),
        ("rms_norm", _function(*_Array, c_void_p, c_int32, c_float, *_Array, *_Range)),
        *fields(_function(*_Array, *_Array, c_int32, *_Range), "add add_model"),
        *fields(_function(c_void_p, c_void_p, c_int64), "to_float from_float"),
        ("embed", _function(c_void_p, c_int32, c_void_p, *_Array, *_Range)),
        ("embed_packed", _function(ns.Matrix, c_void_p, *_Array, *_Range)),
        ("route", _function(ns.Router, *_Array, c_void_p, c_void_p, *_Range, c_void_p)),
        (
            "plan_experts",
            _function(ns.FFNLayer, c_void_p, c_void_p, c_int32, ExpertPlan, c_void_p),
        ),
        *fields(_function(Experts, c_int32, c_int32, c_void_p), "expert_gate_up expert_down"),
        ("gqa_prepare", _function(GQAPrepare, *_Range, *_Range)),
        ("mla_append", _function(MLAAppend, *_Range)),
        ("rotate", _function(Rotate, *_Range, *_Range)),
        ("attend", _function(Attention, AttentionTask, c_int32, c_void_p)),
        ("argmax", _function(c_void_p, c_int32, Best)),
        (
            "sample",
            _function(c_void_p, c_int32, ns.SamplingRule, c_double, c_void_p, result=c_int32),
        ),
        ("scale", _function(c_void_p, c_float, c_int64)),
        (
            "layer_norm",
            _function(*_Array, c_void_p, c_void_p, c_int32, c_float, *_Array, *_Range),
        ),
        ("gate_heads", _function(HeadGates, *_Range, *_Range)),
        ("delta_net", _function(DeltaNet, *_Range, c_void_p)),
        ("weigh_slots", _function(ExpertPlan, c_void_p, c_int32, c_void_p, *_Range)),
    )


SIGNATURES: Signatures = {
    "crosspool_uniform": (c_double, (c_uint64, c_uint64)),
    "crosspool_attention_plan": (
        c_void_p,
        (POINTER(ns.AttentionShape), POINTER(ns.Segment), c_int32, c_int32),
    ),
    "crosspool_attention_plan_tasks": (
        POINTER(AttentionTask),
        (c_void_p, c_int32, POINTER(c_int32), POINTER(c_void_p), POINTER(c_void_p)),
    ),
    "crosspool_attention_plan_free": (None, (c_void_p,)),
}
"""Functions of the library that only tests call."""
