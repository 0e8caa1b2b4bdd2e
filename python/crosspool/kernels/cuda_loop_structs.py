"""Mirrors of the structures in ``sgl-kernel-ext/cuda/stages.h`` and ``loop.h``, field by field; the
headers say what they mean. :mod:`crosspool.kernels.cuda_loop` uses them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p

from crosspool.kernels.engine_structs import Command, Event


class StageWords(ctypes.Structure):
    _fields_ = (
        ("inputs", c_uint64),
        ("layer", c_int32),
        ("link", c_int32),
        ("rows", c_int32),
        ("done", c_int32),
        ("reserved", c_int32 * 2),
    )


class GPUStepArguments(ctypes.Structure):
    _fields_ = (
        ("step", c_uint64),
        ("model", c_uint32),
        ("bucket", c_uint32),
        ("rows", c_uint32),
        ("wanted", c_uint32),
        ("lease", c_uint32),
        ("for_host", c_uint32),
        ("inputs", c_uint64),
        ("tokens", c_uint64),
        ("stops", c_uint64),
        ("stop_ends", c_uint64),
    )


class LaneStatus(ctypes.Structure):
    _fields_ = (
        ("heartbeat", c_uint64),
        ("launches", c_uint64),
        ("step", c_uint64),
        ("phase", c_uint32),
        ("stage", c_uint32),
        ("layer", c_uint32),
        ("fault", c_uint32),
        ("detail", c_uint32),
        ("left", c_uint32),
        ("clock_ns", c_uint64),
        ("_padding", c_uint64),
    )


class TracedStage(ctypes.Structure):
    _fields_ = (
        ("start_ns", c_uint64),
        ("end_ns", c_uint64),
        ("step", c_uint64),
        ("model", c_uint32),
        ("layer", c_uint32),
        ("rows", c_uint32),
        ("lane", c_uint32),
        ("stage", c_uint32),
        ("link", c_uint32),
    )


class LinkMemory(ctypes.Structure):
    _fields_ = (
        ("link", c_uint64),
        ("payload_bytes", c_uint64),
        ("max_rows", c_uint32),
        ("max_row_bytes", c_uint32),
    )


class ModelDescription(ctypes.Structure):
    _fields_ = (
        ("layer_kinds", c_uint64),
        ("layers", c_uint32),
        ("row_bytes", c_uint32),
        ("links", c_uint32),
        ("local", c_uint32),
    )


class LaneDescription(ctypes.Structure):
    _fields_ = (
        ("words", c_uint64),
        ("chosen", c_uint64),
        ("links", c_uint64),
        ("link_count", c_uint32),
        ("role", c_uint32),
    )


class GPULoopDescription(ctypes.Structure):
    _fields_ = (
        ("models", POINTER(ModelDescription)),
        ("lanes", POINTER(LaneDescription)),
        ("bucket_rows", POINTER(c_uint32)),
        ("model_count", c_uint32),
        ("lane_count", c_uint32),
        ("bucket_count", c_uint32),
        ("reserved", c_uint32),
        ("epoch", c_uint64),
        ("spin_ns", c_uint64),
        ("wait_ns", c_uint64),
    )


MIRRORED: tuple[type[ctypes.Structure], ...] = (
    StageWords,
    GPUStepArguments,
    LaneStatus,
    LinkMemory,
    ModelDescription,
    LaneDescription,
    GPULoopDescription,
    Command,
    Event,
    TracedStage,
)
"""Structures in the order of ``crosspool_cuda_sizes``."""

SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "crosspool_abi_version": (c_uint32, ()),
    "crosspool_cuda_error": (c_char_p, ()),
    "crosspool_cuda_sizes": (c_int32, (POINTER(c_uint64), c_int32)),
    "crosspool_cuda_loop_create": (c_void_p, (POINTER(GPULoopDescription),)),
    "crosspool_cuda_loop_free": (c_int32, (c_void_p,)),
    "crosspool_cuda_loop_add_graph": (
        c_int32,
        (c_void_p, c_uint32, c_uint32, c_uint32, c_uint32, c_void_p),
    ),
    "crosspool_cuda_loop_start": (c_int32, (c_void_p,)),
    "crosspool_cuda_loop_probe": (c_int32, (c_void_p, c_void_p, c_int64, POINTER(c_uint8))),
    "crosspool_cuda_loop_quiesce": (c_int32, (c_void_p, c_int64)),
    "crosspool_cuda_loop_push_step": (c_int32, (c_void_p, c_uint32, POINTER(GPUStepArguments))),
    "crosspool_cuda_loop_push": (c_int32, (c_void_p, c_uint32, POINTER(Command))),
    "crosspool_cuda_loop_pop": (c_int32, (c_void_p, POINTER(Event))),
    "crosspool_cuda_loop_wait": (c_int32, (c_void_p, c_int64)),
    "crosspool_cuda_loop_status": (c_int32, (c_void_p, c_uint32, POINTER(LaneStatus))),
    "crosspool_cuda_loop_trace_start": (c_int32, (c_void_p,)),
    "crosspool_cuda_loop_trace_stop": (c_int32, (c_void_p, POINTER(TracedStage), c_uint32)),
}
"""Result and arguments of each function that the library exports."""
