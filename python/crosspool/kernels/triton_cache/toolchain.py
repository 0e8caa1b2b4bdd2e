"""The Triton for which kernels are compiled: this one, or one for another Python.

Triton keeps compiled kernels under a key that contains a hash of its own files. Its shared library
differs from Python to Python, so a cache that is made here for a machine with another Python needs
the key of the Triton there. What compiles is Python code, ptxas and libdevice, which must be the
same; that is checked.
"""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.runtime import cache

from crosspool.config.errors import ConfigError

_LIBRARY = "_C/libtriton.so"
_SAME = re.compile(
    r"(compiler|backends|language|runtime)/.*\.py|backends/nvidia/(bin/ptxas|lib/).*[^/]"
)
"""Files on which compiled kernels depend."""
_OWN = Path(triton.__file__).parent
_OWN_KEY = cache.triton_key()


@dataclass(frozen=True)
class Toolchain:
    """A Triton, as far as compiled kernels depend on it."""

    version: str
    python: str
    """Python's tag: ``cp312``."""
    key: str
    """Triton's part of the key of every compiled kernel."""

    @classmethod
    def own(cls) -> Toolchain:
        """The Triton of this process."""
        return cls(
            triton.__version__, f"cp{sys.version_info.major}{sys.version_info.minor}", _OWN_KEY
        )

    @classmethod
    def of(cls, place: Path) -> Toolchain:
        """The Triton in a wheel, or in a folder into which one was installed.

        Raises ConfigError for one that would compile otherwise than this process's."""
        files = _wheel(place) if place.is_file() else _folder(place)
        own = dict(_folder(_OWN.parent).files)
        for name in sorted(set(files.files) | set(own)):
            if name != _LIBRARY and files.files.get(name) != own.get(name):
                raise ConfigError(
                    f"{place}: triton/{name} is not as in Triton {triton.__version__} here, which "
                    "would compile for it: name the same version"
                )
        key = _OWN_KEY.replace(own[_LIBRARY], files.files[_LIBRARY])
        return cls(triton.__version__, files.python, key)

    def use(self) -> None:
        """Makes this process compile into the cache, and find there, as this Triton would."""
        cache.triton_key = lambda: self.key

    @contextmanager
    def used(self) -> Iterator[None]:
        """Does what :meth:`use` does, for a while."""
        before = cache.triton_key
        self.use()
        try:
            yield
        finally:
            cache.triton_key = before


@dataclass(frozen=True)
class _Files:
    python: str
    files: dict[str, str]
    """SHA-256 of each file on which compiled kernels or their keys depend."""


def _wheel(place: Path) -> _Files:
    try:
        archive = zipfile.ZipFile(place)
    except zipfile.BadZipFile:
        raise ConfigError(f"{place} is no wheel") from None
    with archive:
        names = archive.namelist()

        def members() -> Iterator[tuple[str, str]]:
            for name in names:
                if (inner := _counts(name)) is not None:
                    yield inner, hashlib.sha256(archive.read(name)).hexdigest()

        tags = [archive.read(name).decode() for name in names if _is_tag(name)]
        return _checked(place, tags, dict(members()))


def _folder(place: Path) -> _Files:
    tags = [path.read_text() for path in place.glob("triton-*.dist-info/WHEEL")]
    found = {}
    for path in sorted((place / "triton").rglob("*")):
        inner = _counts(path.relative_to(place).as_posix())
        if inner is not None and path.is_file():
            with path.open("rb") as file:
                found[inner] = hashlib.file_digest(file, "sha256").hexdigest()
    return _checked(place, tags, found)


def _checked(place: Path, tags: list[str], files: dict[str, str]) -> _Files:
    python = re.search(r"^Tag: (cp\d+)-", "".join(tags), re.MULTILINE)
    if python is None or _LIBRARY not in files:
        raise ConfigError(
            f"{place} holds no Triton: name its wheel, or the folder (site-packages) that holds "
            "triton/ and triton-*.dist-info/"
        )
    return _Files(python[1], files)


def _is_tag(name: str) -> bool:
    return re.fullmatch(r"triton-[^/]*\.dist-info/WHEEL", name) is not None


def _counts(name: str) -> str | None:
    """Returns the path inside ``triton/`` of a file that counts."""
    inner = name.removeprefix("triton/")
    counts = inner != name and (inner == _LIBRARY or _SAME.fullmatch(inner) is not None)
    return inner if counts else None
