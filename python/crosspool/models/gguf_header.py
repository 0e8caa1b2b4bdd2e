"""Reads the header of GGUF files: metadata, and where which tensor lies.

The ``gguf`` package knows the types, names and blocks. Its own reader takes seconds for a
vocabulary of 150,000 tokens, and every process reads the header, so this module has one that takes
a third of a second (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosspool.config.errors import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    """Outermost dimension first, as in the checkpoint that the file was made from."""
    type: str
    """Name of its type: ``F32``, ``Q4_K``, ..."""
    offset: int
    """First byte within the file."""
    bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The headers of a GGUF model's files together."""

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def gguf_files(path: Path) -> tuple[Path, ...]:
    """Returns the files of a GGUF model: those of a split beside the first one; of a folder the
    only model that it holds. Empty when the path is none.

    Raises ConfigError for a folder with several models, and for a missing part of a split."""
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        heads = [
            file for file in found if not (m := _SPLIT.fullmatch(file.name)) or m[2] == "00001"
        ]
        if len(heads) > 1:
            raise ConfigError(
                f"{path} holds {len(heads)} GGUF models, {heads[0].name} and {heads[1].name} among "
                "them: name one file"
            )
        path = heads[0] if heads else path
    if path.suffix != ".gguf":
        return ()
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return (path,)
    count = int(split[3])
    parts = [path.with_name(f"{split[1]}-{i + 1:05}-of-{split[3]}.gguf") for i in range(count)]
    for part in parts:
        if not part.exists():
            raise ConfigError(f"{part} is missing: {path.name} is one of {count} parts")
    return tuple(parts)


def read_header(files: tuple[Path, ...]) -> GGUFHeader:
    """Reads the headers of a model's files. Raises ConfigError for a file that is truncated, or no
    GGUF file, or has a tensor of a type that ``gguf`` does not know."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, GGUFTensor] = {}
    for file in files:
        found = _File(file)
        metadata = found.metadata | metadata
        tensors |= found.tensors
    return GGUFHeader(files, metadata, tensors)


class _File:
    def __init__(self, file: Path) -> None:
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._at = 0
        try:
            with (
                file.open("rb") as opened,
                mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                self._data = data
                self._read(file)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise ConfigError(f"{file} cannot be read: {error}") from None
        except (struct.error, UnicodeDecodeError, KeyError):
            raise ConfigError(
                f"{file} ends within its header, or the header is broken at byte {self._at}"
            ) from None

    def _read(self, file: Path) -> None:
        if self._data[:4] != _MAGIC:
            raise ConfigError(f"{file} is no GGUF file: it begins with {self._data[:4]!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ConfigError(f"{file}: GGUF version {version} is not supported, 2 and 3 are")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        for _ in range(pairs):
            name = self._string()
            self.metadata[name] = self._value(self._scalar("I"))
        infos = []
        for _ in range(tensors):
            name = self._string()
            dimensions = [self._scalar("Q") for _ in range(self._scalar("I"))]
            infos.append((name, dimensions[::-1], self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        begin = -(-self._at // alignment) * alignment
        for name, shape, number, offset in infos:
            self.tensors[name] = self._tensor(file, name, shape, number, begin + offset)

    def _tensor(
        self, file: Path, name: str, shape: list[int], number: int, offset: int
    ) -> GGUFTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ConfigError(f"{file}: tensor {name} has the unknown type {number}") from None
        block, size = GGML_QUANT_SIZES[kind]
        elements = 1
        for dimension in shape:
            elements *= dimension
        if shape and shape[-1] % block:
            raise ConfigError(
                f"{file}: tensor {name} has rows of {shape[-1]}, which blocks of {block} of "
                f"{kind.name} do not divide"
            )
        length = elements // block * size
        if offset + length > len(self._data):
            raise ConfigError(
                f"{file} is truncated: it has {len(self._data)} bytes, and tensor {name} ends at "
                f"byte {offset + length}"
            )
        return GGUFTensor(name, file, tuple(shape), kind.name, offset, length)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _FLOAT32:  # the decimal that was meant: 1e-05, not 9.999999747378752e-06
            from numpy import float32

            return float(str(float32(self._scalar("f"))))
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        of, count = self._scalar("I"), self._scalar("Q")
        if of in _SCALARS:
            values = struct.unpack_from(f"<{count}{_SCALARS[of]}", self._data, self._at)
            self._at += struct.calcsize(f"<{count}{_SCALARS[of]}")
            return list(values)
        return [self._value(of) for _ in range(count)]

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        begin = self._at + 8
        self._at = begin + length
        if self._at > len(self._data):
            raise struct.error
        return self._data[begin : self._at].decode("utf-8", "surrogateescape")
