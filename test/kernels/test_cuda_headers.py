"""The structures and names that Python mirrors are those of the GPU libraries' headers."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from crosspool.kernels import cuda_loop, nvshmem
from crosspool.kernels import cuda_loop_structs as cs
from support.fake_cuda_graphs import COMPILER, NATIVE

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def layout_of(structure: type[ctypes.Structure], name: str) -> Iterator[str]:
    """C++ that compiles where every field lies at the header's offset."""
    yield f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});"
    for field, _ in structure._fields_:
        if not field.startswith("_"):
            offset = getattr(structure, field).offset
            yield f"static_assert(offsetof({name}, {field}) == {offset});"


def holds(lines: list[str], folder: Path) -> None:
    """Compiles what is claimed of headers in sgl-kernel-ext/cuda."""
    source = folder / "claims.cpp"
    source.write_text("\n".join(["#include <cstddef>", *lines]) + "\n")
    command = [COMPILER, "-std=c++20", "-fsyntax-only", source]
    subprocess.run([*command, "-I", NATIVE, "-I", NATIVE / "include"], check=True, timeout=60)


def test_structures_and_names_of_the_loop(tmp_path: Path) -> None:
    """Every field at the header's offset, every enumerator with the header's value."""
    lines = ['#include "cuda/loop.h"', "using namespace crosspool;", "using namespace gpu;"]
    for structure in cs.MIRRORED:
        lines += layout_of(structure, structure.__name__)
    spelt = {"FFN": "FFN", "MOE": "MoE"}
    for enumeration in (cuda_loop.Stage, cuda_loop.Phase, cuda_loop.Fault, cuda_loop.BadArgument):
        for member in enumeration:
            words = [spelt.get(word, word.capitalize()) for word in member.name.split("_")]
            value = f"static_cast<int>({enumeration.__name__}::k{''.join(words)})"
            lines.append(f"static_assert({value} == {member.value});")
    lines.append(f"static_assert(kMaxHeld == {cuda_loop.MAX_HELD});")
    holds(lines, tmp_path)


def test_link_ends(tmp_path: Path) -> None:
    lines = ['#include "cuda/nvshmem.h"', *layout_of(nvshmem.LinkEnd, "crosspool_nvshmem_end")]
    lines.append(f"static_assert(CROSSPOOL_NVSHMEM_ID_BYTES == {nvshmem.UNIQUE_ID_BYTES});")
    holds(lines, tmp_path)
    assert nvshmem.device_ends([1, 2], [3, 4])[16:20] == bytes([2, 0, 0, 0])


def test_a_library_of_other_structures_is_refused(
    fake_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*cs.StepArguments._fields_, ("more", ctypes.c_uint64))

    mirrored = tuple(Longer if one is cs.StepArguments else one for one in cs.MIRRORED)
    monkeypatch.setattr(cs, "MIRRORED", mirrored)
    with pytest.raises(ImportError, match="64 bytes for Longer"):
        cuda_loop.load(fake_library)
