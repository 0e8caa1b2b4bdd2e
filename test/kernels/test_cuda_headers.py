"""The structures and names that Python mirrors are those of the GPU libraries' headers."""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path

import pytest
import torch
from crosspool.kernels import cuda_loop, dlpack, nvshmem
from crosspool.kernels import cuda_loop_structs as cs
from support import fake_cuda_graphs
from support.headers import COMPILER, assert_holds, same_functions, same_layout

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def enumeration(members: type[enum.IntEnum], name: str) -> list[str]:
    """C++ that compiles where every enumerator has the header's value."""
    claims = []
    spelt = {"FFN": "FFN", "MOE": "MoE"}
    for member in members:
        words = [spelt.get(word, word.capitalize()) for word in member.name.split("_")]
        claims.append(
            f"static_assert(static_cast<int>({name}::k{''.join(words)}) == {member.value});"
        )
    return claims


def test_the_loop(tmp_path: Path) -> None:
    claims = ["using namespace gpu;", 'extern "C" std::uint32_t crosspool_abi_version();']
    for structure in cs.MIRRORED:
        claims += same_layout(structure)
    claims += same_functions(cs.SIGNATURES)
    for members in (cuda_loop.GPUStage, cuda_loop.LanePhase):
        claims += enumeration(members, members.__name__.removeprefix("Lane"))
    for constant, value in (
        ("kStages", len(cuda_loop.GPUStage)),
        ("kMaxHeld", cuda_loop.MAX_HELD),
        ("kMaxLinks", cuda_loop.MAX_LINKS),
        ("kTraceRoom", cuda_loop.TRACE_ROOM),
    ):
        claims.append(f"static_assert({constant} == {value});")
    assert_holds(claims, tmp_path, "cuda/loop.h")


def test_nvshmem(tmp_path: Path) -> None:
    claims = same_layout(nvshmem.LinkEnd, "crosspool_nvshmem_end")
    claims.append('extern "C" uint32_t crosspool_abi_version();')
    claims += same_functions(nvshmem._SIGNATURES)
    claims.append(f"static_assert(CROSSPOOL_NVSHMEM_ID_BYTES == {nvshmem.UNIQUE_ID_BYTES});")
    assert_holds(claims, tmp_path, "cuda/nvshmem.h")
    assert nvshmem.device_ends([1, 2], [3, 4])[16:20] == bytes([2, 0, 0, 0])


def test_dlpack(tmp_path: Path) -> None:
    """The fields are named otherwise in dlpack.h."""
    claims = []
    for structure, name, fields in (
        (dlpack._Device, "DLDevice", "device_type device_id"),
        (dlpack._DataType, "DLDataType", "code bits lanes"),
        (dlpack._Tensor, "DLTensor", "data device ndim dtype shape strides byte_offset"),
        (dlpack._ManagedTensor, "DLManagedTensor", "dl_tensor manager_ctx deleter"),
    ):
        claims.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for (ours, *_), theirs in zip(structure._fields_, fields.split(), strict=True):
            place = getattr(structure, ours)
            claims.append(f"static_assert(offsetof({name}, {theirs}) == {place.offset});")
            claims.append(f"static_assert(sizeof({name}::{theirs}) == {place.size});")
    for constant, value in (
        ("kDLCPU", dlpack.DLPACK_CPU),
        ("kDLCUDA", dlpack.DLPACK_CUDA),
        ("kDLInt", dlpack._INT),
        ("kDLUInt", dlpack._UINT),
        ("kDLFloat", dlpack._FLOAT),
        ("kDLBfloat", dlpack._BFLOAT),
    ):
        claims.append(f"static_assert({constant} == {value});")
    assert_holds(claims, tmp_path, str(Path(torch.__file__).parent / "include/ATen/dlpack.h"))


def test_the_fake_driver(tmp_path: Path) -> None:
    claims = enumeration(fake_cuda_graphs.Knob, "fake::Knob")
    claims.append(f"static_assert(fake::kInvalidValue == {fake_cuda_graphs.INVALID_VALUE});")
    claims.append(f"static_assert(gpu::kKernelNode == {fake_cuda_graphs.Node.KERNEL:d});")
    claims.append(f"static_assert(gpu::kChildGraphNode == {fake_cuda_graphs.Node.CHILD_GRAPH:d});")
    assert_holds(claims, tmp_path, "test/fake_driver.h")


def test_a_library_of_other_structures_is_refused(
    fake_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*cs.GPUStepArguments._fields_, ("more", ctypes.c_uint64))

    mirrored = tuple(Longer if one is cs.GPUStepArguments else one for one in cs.MIRRORED)
    monkeypatch.setattr(cs, "MIRRORED", mirrored)
    with pytest.raises(ImportError, match="64 bytes for Longer"):
        cuda_loop.load(fake_library)
