"""The structures and names that Python mirrors are those of the GPU libraries' headers."""

from __future__ import annotations

import ctypes
import enum
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from crosspool.kernels import cuda_loop, dlpack, nvshmem
from crosspool.kernels import cuda_loop_structs as cs
from support import fake_cuda_graphs
from support.fake_cuda_graphs import COMPILER, NATIVE
from support.loop_bench import Phase

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


PREAMBLE = """
#include <cstddef>
#include <initializer_list>
#include <type_traits>
template <class T> constexpr int kind() {
  if constexpr (std::is_void_v<T>) return 0;
  else return 4 * sizeof(T) + (std::is_pointer_v<T> ? 3 : std::is_class_v<T> ? 2
                               : std::is_signed_v<T> ? 1 : 0);
}
template <class R, class... A> constexpr bool is(R (*)(A...), std::initializer_list<int> kinds) {
  std::initializer_list<int> own{kind<R>(), kind<A>()...};
  if (own.size() != kinds.size()) return false;
  for (std::size_t i = 0; i < own.size(); ++i) if (own.begin()[i] != kinds.begin()[i]) return false;
  return true;
}
"""


def layout_of(structure: type[ctypes.Structure], name: str) -> Iterator[str]:
    """C++ that compiles where the structure has the header's fields, no more and no fewer, each at
    its offset and of its size."""
    yield f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});"
    fields = [field for field, *_ in structure._fields_ if not field.startswith("_")]
    for field in fields:
        place = getattr(structure, field)
        yield f"static_assert(offsetof({name}, {field}) == {place.offset});"
        yield f"static_assert(sizeof({name}::{field}) == {place.size});"
    bindings = ", ".join(f"_{i}" for i in range(len(fields)))
    yield f"void all_of({name} one) {{ auto [{bindings}] = one; }}"


def kind(of: type | None) -> int:
    """A type's code in PREAMBLE: its size, and whether it is a pointer, a class or signed."""
    if of is None:
        return 0
    if issubclass(of, ctypes._Pointer | ctypes.c_void_p | ctypes.c_char_p):
        return 4 * ctypes.sizeof(of) + 3
    if issubclass(of, ctypes.Structure):
        return 4 * ctypes.sizeof(of) + 2
    return 4 * ctypes.sizeof(of) + (of(-1).value < 0)


def functions(signatures: Mapping[str, tuple[type | None, tuple[type, ...]]]) -> Iterator[str]:
    """C++ that compiles where functions take and return what Python says."""
    for name, (result, arguments) in signatures.items():
        kinds = ", ".join(str(kind(one)) for one in (result, *arguments))
        yield f"static_assert(is({name}, {{{kinds}}}));"


def enumeration(members: type[enum.IntEnum], name: str) -> Iterator[str]:
    """C++ that compiles where every enumerator has the header's value."""
    spelt = {"FFN": "FFN", "MOE": "MoE"}
    for member in members:
        words = [spelt.get(word, word.capitalize()) for word in member.name.split("_")]
        yield f"static_assert(static_cast<int>({name}::k{''.join(words)}) == {member.value});"


def holds(lines: list[str], folder: Path) -> None:
    """Compiles what is claimed of the headers."""
    source = folder / "claims.cpp"
    includes = [line for line in lines if line.startswith("#include")]
    claims = [line for line in lines if not line.startswith("#include")]
    source.write_text("\n".join([*includes, PREAMBLE, *claims]) + "\n")
    folders = [NATIVE, NATIVE / "include", Path(torch.__file__).parent / "include"]
    command = [COMPILER, "-std=c++20", "-fsyntax-only", source, *(f"-I{f}" for f in folders)]
    subprocess.run(command, check=True, timeout=60)


def test_the_loop(tmp_path: Path) -> None:
    lines = ['#include "cuda/loop.h"', "using namespace crosspool;", "using namespace gpu;"]
    lines.append('extern "C" std::uint32_t crosspool_abi_version();')
    for structure in cs.MIRRORED:
        lines += layout_of(structure, structure.__name__)
    lines += functions(cs.SIGNATURES)
    for members in (cuda_loop.GPUStage, Phase):
        lines += enumeration(members, members.__name__)
    for constant, value in (
        ("kStages", len(cuda_loop.GPUStage)),
        ("kMaxHeld", cuda_loop.MAX_HELD),
        ("kMaxLinks", cuda_loop.MAX_LINKS),
        ("kTraceRoom", cuda_loop.TRACE_ROOM),
    ):
        lines.append(f"static_assert({constant} == {value});")
    holds(lines, tmp_path)


def test_nvshmem(tmp_path: Path) -> None:
    lines = ['#include "cuda/nvshmem.h"', *layout_of(nvshmem.LinkEnd, "crosspool_nvshmem_end")]
    lines.append('extern "C" uint32_t crosspool_abi_version();')
    lines += functions(nvshmem._SIGNATURES)
    lines.append(f"static_assert(CROSSPOOL_NVSHMEM_ID_BYTES == {nvshmem.UNIQUE_ID_BYTES});")
    holds(lines, tmp_path)
    assert nvshmem.device_ends([1, 2], [3, 4])[16:20] == bytes([2, 0, 0, 0])


def test_dlpack(tmp_path: Path) -> None:
    """The fields are named otherwise in dlpack.h."""
    lines = ["#include <ATen/dlpack.h>"]
    for structure, name, fields in (
        (dlpack._Device, "DLDevice", "device_type device_id"),
        (dlpack._DataType, "DLDataType", "code bits lanes"),
        (dlpack._Tensor, "DLTensor", "data device ndim dtype shape strides byte_offset"),
        (dlpack._ManagedTensor, "DLManagedTensor", "dl_tensor manager_ctx deleter"),
    ):
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for (ours, *_), theirs in zip(structure._fields_, fields.split(), strict=True):
            place = getattr(structure, ours)
            lines.append(f"static_assert(offsetof({name}, {theirs}) == {place.offset});")
            lines.append(f"static_assert(sizeof({name}::{theirs}) == {place.size});")
    for constant, value in (
        ("kDLCPU", dlpack.DLPACK_CPU),
        ("kDLCUDA", dlpack.DLPACK_CUDA),
        ("kDLInt", dlpack._INT),
        ("kDLUInt", dlpack._UINT),
        ("kDLFloat", dlpack._FLOAT),
        ("kDLBfloat", dlpack._BFLOAT),
    ):
        lines.append(f"static_assert({constant} == {value});")
    holds(lines, tmp_path)


def test_the_fake_driver(tmp_path: Path) -> None:
    lines = ['#include "test/fake_driver.h"', "using namespace crosspool;"]
    lines += enumeration(fake_cuda_graphs.Knob, "fake::Knob")
    lines.append(f"static_assert(fake::kInvalidValue == {fake_cuda_graphs.INVALID_VALUE});")
    lines.append(f"static_assert(gpu::kKernelNode == {fake_cuda_graphs.Node.KERNEL:d});")
    lines.append(f"static_assert(gpu::kChildGraphNode == {fake_cuda_graphs.Node.CHILD_GRAPH:d});")
    holds(lines, tmp_path)


def test_a_library_of_other_structures_is_refused(
    fake_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*cs.GPUStepArguments._fields_, ("more", ctypes.c_uint64))

    mirrored = tuple(Longer if one is cs.GPUStepArguments else one for one in cs.MIRRORED)
    monkeypatch.setattr(cs, "MIRRORED", mirrored)
    with pytest.raises(ImportError, match="64 bytes for Longer"):
        cuda_loop.load(fake_library)
