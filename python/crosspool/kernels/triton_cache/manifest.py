"""The list of compiled kernels that lies beside them: for what they were compiled, and the SHA-256
of every file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import crosspool
import crosspool.kernels.triton
from crosspool.kernels.triton_cache.toolchain import Toolchain

NAME = "crosspool-kernels.json"
_ENTRY, _FILE = re.compile("[A-Z2-7]{52}"), re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Identity:
    """The circumstances for which kernels were compiled. Those of others are never launched."""

    crosspool: str
    """CrossPool's version."""
    sources: str
    """SHA-256 over the kernels' sources."""
    triton: str
    """Triton's version."""
    triton_key: str
    """SHA-256 of Triton's part of the cache keys."""
    python: str
    """Python's tag: ``cp312``."""

    @classmethod
    def of(cls, toolchain: Toolchain) -> Identity:
        sources = hashlib.sha256()
        for path in sorted(Path(crosspool.kernels.triton.__file__).parent.glob("*.py")):
            sources.update(path.name.encode() + path.read_bytes())
        return cls(
            crosspool=crosspool.__version__,
            sources=sources.hexdigest(),
            triton=toolchain.version,
            triton_key=hashlib.sha256(toolchain.key.encode()).hexdigest(),
            python=toolchain.python,
        )

    def differences(self, other: Identity) -> list[str]:
        """Names what of ``other`` is not as here, so that its kernels would never be found."""
        here, there = asdict(self), asdict(other)
        return [
            f"{name} is {there[name][:12]} instead of {here[name][:12]}"
            for name in ("sources", "triton", "triton_key", "python")
            if here[name] != there[name]
        ]


@dataclass(frozen=True)
class CacheEntry:
    """A compiled kernel: one folder of Triton's cache."""

    kernel: str
    capability: int | None
    """Compute capability, 90 for sm_90; None for what runs on the host."""
    models: tuple[str, ...]
    """Models for which it was compiled."""
    files: dict[str, str]
    """SHA-256 of each file by its name."""

    def __str__(self) -> str:
        return self.kernel if self.capability is None else f"{self.kernel} for sm_{self.capability}"


@dataclass
class Manifest:
    """The compiled kernels of one folder."""

    identity: Identity
    entries: dict[str, CacheEntry] = field(default_factory=dict)
    """Entries by the names of their folders."""

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Returns the folder's manifest; None where there is none. Raises ValueError for one that
        cannot be read."""
        path = folder / NAME
        try:
            return cls.parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Raises ValueError, TypeError or KeyError for what is no manifest, and for names that
        would lead out of the folder: entries are written and removed by them."""
        known = json.loads(data)
        entries = {
            name: CacheEntry(**{**entry, "models": tuple(entry["models"])})
            for name, entry in known["entries"].items()
        }
        for name, entry in entries.items():
            if not _ENTRY.fullmatch(name) or not all(map(_FILE.fullmatch, entry.files)):
                raise ValueError(f"{name} or a file of it is no name that Triton's cache gives")
        return cls(Identity(**known["identity"]), entries)

    def encode(self) -> bytes:
        known: dict[str, Any] = asdict(self)
        return json.dumps(known, indent=1).encode()

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest at once."""
        fresh = folder / f"{NAME}.{os.getpid()}"
        fresh.write_bytes(self.encode())
        fresh.replace(folder / NAME)

    def damaged(self, folder: Path) -> dict[str, str]:
        """Returns what is wrong with entries, by their names."""
        return {
            name: f"{entry} ({name}): {wrong}"
            for name, entry in self.entries.items()
            if (wrong := _wrong(folder / name, entry)) is not None
        }

    def drop(self, folder: Path, names: Iterable[str]) -> None:
        """Removes entries with their files."""
        for name in list(names):
            shutil.rmtree(folder / name, ignore_errors=True)
            del self.entries[name]


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _wrong(folder: Path, entry: CacheEntry) -> str | None:
    for name, digest in entry.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return f"{name} is damaged"
    return None
