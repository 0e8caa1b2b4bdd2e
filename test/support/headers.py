"""Claims about the native headers that the compiler checks: constants, ctypes mirrors field by
field, and the types of functions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosspool.kernels.native import Signatures

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

PREAMBLE = """
#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <type_traits>
// A type's size and kind. A reference is passed as a pointer is.
template <class T> constexpr int code() {
  if constexpr (std::is_void_v<T>) return 0;
  else if constexpr (std::is_pointer_v<T> || std::is_reference_v<T>) return 8 * sizeof(void*) + 4;
  else if constexpr (std::is_class_v<T>) return 8 * sizeof(T) + 3;
  else if constexpr (std::is_floating_point_v<T>) return 8 * sizeof(T) + 2;
  else return 8 * sizeof(T) + std::is_signed_v<T>;
}
template <class R, class... A> constexpr bool is(R (*)(A...), std::initializer_list<int> codes) {
  const int own[] = {code<R>(), code<A>()...};
  if (std::size(own) != codes.size()) return false;
  for (std::size_t i = 0; i < codes.size(); ++i) if (own[i] != codes.begin()[i]) return false;
  return true;
}
namespace crosspool {}
using namespace crosspool;
"""


def same_layout(mirror: type[ctypes.Structure], name: str | None = None) -> list[str]:
    """C++ that compiles where a struct (by default of the mirror's name) has the mirror's fields
    and no others, each at the mirror's offset and of its size, functions with its types. Fields of
    a mirror that begin with an underscore stand for padding."""
    name = name or mirror.__name__
    claims = [f"static_assert(sizeof({name}) == {ctypes.sizeof(mirror)});"]
    bound = []
    for field, of, *_ in mirror._fields_:
        if field.startswith("_"):
            continue
        place = getattr(mirror, field)
        claims.append(f"static_assert(offsetof({name}, {field}) == {place.offset});")
        claims.append(f"static_assert(sizeof({name}::{field}) == {place.size});")
        function: Any = of
        if hasattr(function, "_argtypes_"):
            null = f"static_cast<decltype({name}::{field})>(nullptr)"
            claims.append(same_function(null, function._restype_, function._argtypes_))
        bound.append(f"field_{field}")
    claims.append(f"void all_fields({name}& one) {{ auto& [{', '.join(bound)}] = one; }}")
    return claims


def same_function(name: str, result: type | None, takes: Sequence[type]) -> str:
    """C++ that compiles where a function returns and takes values of these sizes and kinds."""
    codes = ", ".join(str(_code(one)) for one in (result, *takes))
    return f"static_assert(is({name}, {{{codes}}}));"


def same_functions(signatures: Signatures) -> list[str]:
    """The claim of :func:`same_function` for each of a library's functions."""
    return [same_function(name, result, takes) for name, (result, takes) in signatures.items()]


def _code(of: Any) -> int:
    """The PREAMBLE's code of a type."""
    if of is None:
        return 0
    size = 8 * ctypes.sizeof(of)
    if issubclass(of, ctypes._Pointer | ctypes.c_void_p | ctypes.c_char_p):
        return size + 4
    if issubclass(of, ctypes.Structure):
        return size + 3
    if issubclass(of, ctypes.c_float | ctypes.c_double):
        return size + 2
    return size + int(of(-1).value < 0)


def assert_holds(claims: Sequence[str], folder: Path, *headers: str) -> None:
    """Compiles what is claimed of ``headers``, whose paths begin in sgl-kernel-ext/ or in its
    include/."""
    source = folder / "claims.cpp"
    includes = [f'#include "{header}"' for header in headers]
    source.write_text("\n".join([*includes, PREAMBLE, *claims]) + "\n")
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{NATIVE}", f"-I{NATIVE / 'include'}"]
    done = subprocess.run([*command, str(source)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
