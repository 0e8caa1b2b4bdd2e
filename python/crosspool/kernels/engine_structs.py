"""Mirrors of the structures of ``sgl-kernel-ext/cpu/engine/`` and of
``include/crosspool/command_ring.h``. The headers say what the fields mean;
:mod:`crosspool.kernels.engine` passes them to the library."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p

import numpy as np

from crosspool.kernels import native_structs as ns
from crosspool.kernels.native import Signatures
from crosspool.kernels.native_structs import fields

GQA, MLA = 0, 1
"""Values of ``crosspool::AttentionKind``."""
GREEDY, DRAW, HOST = 0, 1, 2
"""Values of ``crosspool::Choice``."""
STEP, RESUME, RECALL, CLOSE, ADD, REMOVE = 1, 2, 4, 6, 7, 8
"""Values of ``crosspool::CommandKind``."""
DONE, LOGITS, FAILED, TOKENS, REFUSED, CLOSED, ADDED, REMOVED = 1, 2, 3, 4, 5, 6, 7, 8
"""Values of ``crosspool::EventKind``."""
ATTENTION_WEIGHTS, FFN_WEIGHTS = 0, 1
"""Values of ``crosspool::WeightPart``."""
HERE, LATER, NEVER = 0, 1, 2
"""Values of ``crosspool::Weights``."""


class AttentionLayer(ctypes.Structure):
    _fields_ = (
        *fields(c_void_p, "input_norm post_norm"),
        ("qkv", POINTER(ns.Matrix)),
        ("qkv_matrices", c_int64),
        *fields(c_void_p, "qkv_bias q_norm k_norm"),
        ("q_a", POINTER(ns.Matrix)),
        *fields(c_void_p, "q_a_bias q_a_norm"),
        *fields(POINTER(ns.Matrix), "q kv_a"),
        *fields(c_void_p, "kv_a_bias kv_a_norm"),
        *fields(POINTER(ns.Matrix), "keys_up values_up o"),
        *fields(c_void_p, "o_bias sinks"),
        ("sees_all", c_int64),
        *fields(c_void_p, "input_norm_bias post_norm_bias"),
        *fields(POINTER(ns.Matrix), "qkvz rates"),
        *fields(c_void_p, "taps decay decay_bias out_norm"),
        ("delta_layers_before", c_int64),
        ("unrotated", c_int64),
    )


class FFNTable(ctypes.Structure):
    _fields_ = (
        ("layer", ns.FFNLayer),
        ("router", ns.Router),
        ("router_weight", POINTER(ns.Matrix)),
        ("router_bias", c_void_p),
    )


class ModelTable(ctypes.Structure):
    _fields_ = (
        *fields(c_int32, "dtype hidden vocab layers"),
        ("norm_eps", c_float),
        ("attention_kind", c_int32),
        ("shape", ns.AttentionShape),
        ("rope", ns.Rope),
        ("kv", ns.KVCache),
        ("qk_norm", c_int32),
        ("qkv_clip", c_float),
        *fields(c_int32, "nope_dim value_dim"),
        ("latent_norm_eps", c_float),
        ("attention", POINTER(AttentionLayer)),
        *fields(c_void_p, "embed final_norm"),
        ("head", POINTER(ns.Matrix)),
        ("ffn", POINTER(FFNTable)),
        ("ffn_ranks", POINTER(c_int32)),
        *fields(c_int32, "ffn_rank_count weights number"),
        *fields(c_float, "embed_scale attention_scale logit_scale"),
        *fields(c_void_p, "final_norm_bias head_bias query_factors"),
        ("gated", c_int32),
        ("delta", ns.DeltaShape),
    )


class WantedRow(ctypes.Structure):
    _fields_ = (
        ("residual", c_void_p),
        *fields(c_int32, "row choice"),
        ("rule", ns.SamplingRule),
        *fields(c_uint64, "seed position"),
        ("stops", c_void_p),
        ("stop_count", c_int32),
    )


class Keep(ctypes.Structure):
    _fields_ = (("into", c_void_p), ("row", c_int32))


class StepArguments(ctypes.Structure):
    _fields_ = (
        ("step", c_uint64),
        *fields(c_int32, "model rows segment_count wanted_count keep_count lease"),
        *fields(c_void_p, "tokens segments wanted keep chosen"),
        ("steps_done", c_int32),
    )


class LinkDescription(ctypes.Structure):
    _fields_ = (
        ("link", c_void_p),
        ("payload_bytes", c_uint64),
        *fields(c_uint32, "max_rows max_row_bytes"),
        *fields(c_void_p, "peer counters connection"),
        *fields(c_int32, "attention_rank lane ffn_rank"),
    )


class LoopDescription(ctypes.Structure):
    _fields_ = (
        ("models", POINTER(ModelTable)),
        *fields(POINTER(LinkDescription), "outgoing incoming"),
        *fields(c_void_p, "local_counters doorbell heartbeat experts network"),
        ("epoch", c_uint64),
        *fields(c_int64, "spin_ns busy_spin_ns"),
        *fields(c_int32, "model_count outgoing_count incoming_count lanes max_rows"),
        *fields(c_int32, "attention_rank ffn_rank event_fd model_places"),
    )


class Command(ctypes.Structure):
    _fields_ = (
        *fields(c_uint32, "kind lane"),
        ("step", c_uint64),
        ("arguments", c_void_p),
        ("reserved", c_uint64),
    )


class Event(ctypes.Structure):
    _fields_ = (
        *fields(c_uint32, "kind lane"),
        ("step", c_uint64),
        *fields(c_uint32, "first count"),
        ("address", c_void_p),
    )


class TraceEvent(ctypes.Structure):
    _fields_ = (
        *fields(c_int64, "start_ns end_ns step"),
        *fields(c_int32, "attention_rank lane model layer part rows"),
    )


class NativeLinkCounters(ctypes.Structure):
    _fields_ = tuple(fields(c_uint64, "dispatches rows dispatch_bytes combine_bytes"))


class Span(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *fields(c_uint64, "offset checksum"),
        ("unit_bytes", c_int64),
        ("units", c_int32),
    )


class ReadStage(ctypes.Structure):
    _fields_ = tuple(fields(c_int32, "file first count part layers"))


class StagedReading(ctypes.Structure):
    _fields_ = (
        ("stages", POINTER(ReadStage)),
        ("spans", POINTER(Span)),
        ("checksums", POINTER(c_uint64)),
        *fields(c_int32, "stage_count model event_fd stages_read"),
        ("bytes", c_uint64),
        ("stop", c_int32),
    )


class PooledExpert(ctypes.Structure):
    _fields_ = (
        *fields(POINTER(ns.Matrix), "gate_up down"),
        *fields(c_uint64, "gate_up_offset down_offset gate_up_checksum down_checksum"),
        ("layer", c_int32),
    )


class NativeExpertCounters(ctypes.Structure):
    _fields_ = (
        *fields(c_uint64, "hits misses early early_used read_bytes evictions stall_ns"),
        ("present_bytes", c_uint64),
        ("error", c_int32),
    )


MIRRORED: tuple[type[ctypes.Structure], ...] = (
    AttentionLayer,
    FFNTable,
    ModelTable,
    WantedRow,
    Keep,
    StepArguments,
    LinkDescription,
    LoopDescription,
    Command,
    Event,
    TraceEvent,
    NativeLinkCounters,
    Span,
    ReadStage,
    StagedReading,
    PooledExpert,
    NativeExpertCounters,
)
"""Structures whose sizes ``crosspool_engine_sizes`` tells, in its order."""

SEGMENT = np.dtype(ns.Segment)
WANTED = np.dtype(WantedRow)
KEEP = np.dtype(Keep)
"""Dtypes of the arrays of a step's structures, which numpy fills."""

SIGNATURES: Signatures = {
    "crosspool_error": (ctypes.c_char_p, ()),
    "crosspool_engine_sizes": (c_int32, (POINTER(c_uint64), c_int32)),
    "crosspool_team_create": (c_void_p, (POINTER(c_int32), c_int32)),
    "crosspool_team_free": (None, (c_void_p,)),
    "crosspool_team_pack": (None, (c_void_p, POINTER(ns.Matrix), POINTER(ns.Source), c_int32)),
    "crosspool_team_pack_gated": (
        None,
        (c_void_p, POINTER(ns.Matrix), POINTER(ns.Source), POINTER(ns.Source)),
    ),
    "crosspool_team_pack_grouped": (
        None,
        (c_void_p, POINTER(ns.Matrix), POINTER(ns.CodeSource)),
    ),
    "crosspool_team_read": (c_int32, (c_void_p, c_int32, POINTER(Span), c_int32)),
    "crosspool_checksums": (None, (POINTER(Span), c_int32)),
    "crosspool_experts_create": (
        c_void_p,
        (c_void_p, c_int64, POINTER(c_int32), c_int32, c_int32, c_int32),
    ),
    "crosspool_experts_free": (None, (c_void_p,)),
    "crosspool_experts_add": (
        c_int32,
        (c_void_p, c_int32, c_int32, POINTER(PooledExpert), c_int32),
    ),
    "crosspool_experts_remove": (None, (c_void_p, c_int32)),
    "crosspool_experts_failed": (c_int32, (c_void_p,)),
    "crosspool_experts_counters": (None, (c_void_p, c_int32, POINTER(NativeExpertCounters))),
    "crosspool_loop_create": (c_void_p, (c_void_p, POINTER(LoopDescription))),
    "crosspool_loop_free": (None, (c_void_p,)),
    "crosspool_loop_push": (c_int32, (c_void_p, POINTER(Command))),
    "crosspool_loop_pop": (c_int32, (c_void_p, POINTER(Event))),
    "crosspool_loop_last_served": (c_int64, (c_void_p,)),
    "crosspool_loop_set_present": (None, (c_void_p, c_int32, c_int32, c_int32)),
    "crosspool_loop_read": (c_int32, (c_void_p, POINTER(StagedReading))),
    "crosspool_loop_trace_start": (None, (c_void_p,)),
    "crosspool_loop_trace_stop": (c_uint64, (c_void_p, POINTER(TraceEvent), c_uint64)),
}
"""Functions that the library exports for the engine."""
