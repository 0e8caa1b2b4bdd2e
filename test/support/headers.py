"""Claims about the native headers that the compiler checks: constants, and ctypes mirrors field by
field."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def same_layout(mirror: type[ctypes.Structure], name: str | None = None) -> list[str]:
    """C++ that compiles where a struct (by default of the mirror's name) has the mirror's fields
    and no others, each at the mirror's offset and of its size. Fields of a mirror that begin with
    an underscore stand for padding."""
    name = name or mirror.__name__
    names = [field[0] for field in mirror._fields_ if not field[0].startswith("_")]
    lines = [f"static_assert(sizeof({name}) == {ctypes.sizeof(mirror)});"]
    for field in names:
        place = getattr(mirror, field)
        lines.append(f"static_assert(offsetof({name}, {field}) == {place.offset});")
        lines.append(f"static_assert(sizeof({name}::{field}) == {place.size});")
    bound = ", ".join(f"field_{index}" for index in range(len(names)))
    lines.append(f"void all_fields({name}& one) {{ auto& [{bound}] = one; }}")
    return lines


def assert_holds(claims: Sequence[str], folder: Path, *headers: str) -> None:
    """Compiles what is claimed of ``headers``, whose paths begin in sgl-kernel-ext/."""
    lines = [f'#include "{header}"' for header in headers] + ["using namespace crosspool;"]
    source = folder / "claims.cpp"
    source.write_text("\n".join(["#include <cstddef>", *lines, *claims]) + "\n")
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-I", NATIVE, "-I", NATIVE / "include"]
    done = subprocess.run([*command, source], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
