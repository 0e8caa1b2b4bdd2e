"""The structures of ``sgl-kernel-ext/cpu/engine/`` and of ``include/crosspool/command_ring.h``,
field by field; the headers say what they mean. :mod:`crosspool.kernels.engine` is their face."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p

import numpy as np

from crosspool.kernels import native_structs as ns

GQA, MLA = 0, 1
"""crosspool::AttentionKind."""
GREEDY, DRAW, HOST = 0, 1, 2
"""crosspool::Choice."""
STEP, RESUME, RECALL = 1, 2, 4
"""crosspool::CommandKind."""
DONE, LOGITS, FAILED, TOKENS = 1, 2, 3, 4
"""crosspool::EventKind."""


class AttentionLayer(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("qkv", POINTER(ns.Matrix)),
        ("qkv_bias", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("q_a", POINTER(ns.Matrix)),
        ("q_a_bias", c_void_p),
        ("q_a_norm", c_void_p),
        ("q", POINTER(ns.Matrix)),
        ("kv_a", POINTER(ns.Matrix)),
        ("kv_a_bias", c_void_p),
        ("kv_a_norm", c_void_p),
        ("keys_up", POINTER(ns.Matrix)),
        ("values_up", POINTER(ns.Matrix)),
        ("o", POINTER(ns.Matrix)),
        ("o_bias", c_void_p),
    )


class FFNTable(ctypes.Structure):
    _fields_ = (
        ("layer", ns.FFNLayer),
        ("router", ns.Router),
        ("router_weight", POINTER(ns.Matrix)),
    )


class ModelTable(ctypes.Structure):
    _fields_ = (
        ("dtype", c_int32),
        ("hidden", c_int32),
        ("vocab", c_int32),
        ("layers", c_int32),
        ("norm_eps", c_float),
        ("attention_kind", c_int32),
        ("shape", ns.AttentionShape),
        ("rope", ns.Rope),
        ("kv", ns.KVCache),
        ("qk_norm", c_int32),
        ("qkv_clip", c_float),
        ("nope_dim", c_int32),
        ("value_dim", c_int32),
        ("latent_norm_eps", c_float),
        ("attention", POINTER(AttentionLayer)),
        ("embed", c_void_p),
        ("final_norm", c_void_p),
        ("head", POINTER(ns.Matrix)),
        ("ffn", POINTER(FFNTable)),
        ("ffn_ranks", POINTER(c_int32)),
        ("ffn_rank_count", c_int32),
    )


class Wanted(ctypes.Structure):
    _fields_ = (
        ("residual", c_void_p),
        ("row", c_int32),
        ("choice", c_int32),
        ("rule", ns.SamplingRule),
        ("seed", c_uint64),
        ("position", c_uint64),
        ("stops", c_void_p),
        ("stop_count", c_int32),
    )


class Keep(ctypes.Structure):
    _fields_ = (("into", c_void_p), ("row", c_int32))


class StepArguments(ctypes.Structure):
    _fields_ = (
        ("step", c_uint64),
        ("model", c_int32),
        ("rows", c_int32),
        ("segment_count", c_int32),
        ("wanted_count", c_int32),
        ("keep_count", c_int32),
        ("lease", c_int32),
        ("tokens", c_void_p),
        ("segments", c_void_p),
        ("wanted", c_void_p),
        ("keep", c_void_p),
        ("chosen", c_void_p),
        ("steps_done", c_int32),
        ("reserved", c_int32),
    )


class LinkDescription(ctypes.Structure):
    _fields_ = (
        ("link", c_void_p),
        ("payload_bytes", c_uint64),
        ("max_rows", c_uint32),
        ("max_row_bytes", c_uint32),
        ("peer", c_void_p),
        ("counters", c_void_p),
        ("attention_rank", c_int32),
        ("lane", c_int32),
        ("ffn_rank", c_int32),
        ("reserved", c_int32),
    )


class LoopDescription(ctypes.Structure):
    _fields_ = (
        ("models", POINTER(ModelTable)),
        ("outgoing", POINTER(LinkDescription)),
        ("incoming", POINTER(LinkDescription)),
        ("local_counters", c_void_p),
        ("doorbell", c_void_p),
        ("epoch", c_uint64),
        ("spin_ns", c_int64),
        ("busy_spin_ns", c_int64),
        ("model_count", c_int32),
        ("outgoing_count", c_int32),
        ("incoming_count", c_int32),
        ("lanes", c_int32),
        ("max_rows", c_int32),
        ("attention_rank", c_int32),
        ("ffn_rank", c_int32),
        ("event_fd", c_int32),
    )


class Command(ctypes.Structure):
    _fields_ = (
        ("kind", c_uint32),
        ("lane", c_uint32),
        ("step", c_uint64),
        ("arguments", c_void_p),
        ("reserved", c_uint64),
    )


class Event(ctypes.Structure):
    _fields_ = (
        ("kind", c_uint32),
        ("lane", c_uint32),
        ("step", c_uint64),
        ("first", c_uint32),
        ("count", c_uint32),
        ("address", c_void_p),
    )


class TraceEvent(ctypes.Structure):
    _fields_ = (
        ("start_ns", c_int64),
        ("end_ns", c_int64),
        ("step", c_int64),
        ("attention_rank", c_int32),
        ("lane", c_int32),
        ("model", c_int32),
        ("layer", c_int32),
        ("part", c_int32),
        ("rows", c_int32),
    )


class LinkCounters(ctypes.Structure):
    _fields_ = (
        ("dispatches", c_uint64),
        ("rows", c_uint64),
        ("dispatch_bytes", c_uint64),
        ("combine_bytes", c_uint64),
    )


MIRRORED: tuple[type[ctypes.Structure], ...] = (
    AttentionLayer,
    FFNTable,
    ModelTable,
    Wanted,
    Keep,
    StepArguments,
    LinkDescription,
    LoopDescription,
    Command,
    Event,
    TraceEvent,
    LinkCounters,
)
"""In the order of ``crosspool_engine_sizes``."""

SEGMENT = np.dtype(ns.Segment)
WANTED = np.dtype(Wanted)
KEEP = np.dtype(Keep)
"""Arrays of a step's structures, filled by numpy."""

SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "crosspool_error": (ctypes.c_char_p, ()),
    "crosspool_engine_sizes": (c_int32, (POINTER(c_uint64), c_int32)),
    "crosspool_link_offset": (c_uint64, (c_uint32,) * 6),
    "crosspool_team_create": (c_void_p, (POINTER(c_int32), c_int32)),
    "crosspool_team_free": (None, (c_void_p,)),
    "crosspool_team_pack": (None, (c_void_p, POINTER(ns.Matrix), POINTER(ns.Source), c_int32)),
    "crosspool_team_pack_gated": (
        None,
        (c_void_p, POINTER(ns.Matrix), POINTER(ns.Source), POINTER(ns.Source)),
    ),
    "crosspool_loop_create": (c_void_p, (c_void_p, POINTER(LoopDescription))),
    "crosspool_loop_free": (None, (c_void_p,)),
    "crosspool_loop_push": (c_int32, (c_void_p, POINTER(Command))),
    "crosspool_loop_pop": (c_int32, (c_void_p, POINTER(Event))),
    "crosspool_loop_last_served": (c_int64, (c_void_p,)),
    "crosspool_loop_trace_start": (None, (c_void_p,)),
    "crosspool_loop_trace_stop": (c_uint64, (c_void_p, POINTER(TraceEvent), c_uint64)),
}
"""What the library exports for the engine."""
