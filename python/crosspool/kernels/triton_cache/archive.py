"""Compiled kernels in one file (.tar.gz): the manifest first, then what launching them needs."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosspool.config.errors import ConfigError
from crosspool.kernels.triton_cache.kernel_cache import KernelCache, link
from crosspool.kernels.triton_cache.manifest import NAME, CacheEntry, Identity, Manifest


def pack(folder: Path, entries: dict[str, CacheEntry], identity: Identity, archive: Path) -> None:
    """Writes ``entries`` of ``folder`` to ``archive``."""
    manifest = Manifest(identity, entries)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        _add(tar, NAME, manifest.encode())
        for name, entry in sorted(entries.items()):
            for file in sorted(entry.files):
                _add(tar, f"{name}/{file}", (folder / name / file).read_bytes())


def check(archive: Path) -> tuple[Manifest, list[str]]:
    """Returns the archive's manifest, and what is wrong with its entries, by name.

    Raises ConfigError for a file that is no such archive."""
    with _opened(archive) as (tar, manifest):
        wrong = []
        for name, entry in manifest.entries.items():
            for file, digest in entry.files.items():
                problem = _read(tar, f"{name}/{file}", digest)[1]
                if problem is not None:
                    wrong.append(f"{entry} ({name}): {file} is {problem}")
        return manifest, wrong


def unpack(archive: Path, cache: KernelCache) -> int:
    """Adds the archive's kernels to those in the cache's folder. Returns their number.

    Raises ConfigError for an archive that is damaged, or made for another Triton, Python or other
    kernels; nothing is added then."""
    manifest, wrong = check(archive)
    if different := cache.identity.differences(manifest.identity):
        wrong = [f"its kernels are foreign: {', '.join(different)}"]
    if wrong:
        raise ConfigError(f"{archive}: {'; '.join(wrong)}")
    with cache.opened(), _opened(archive) as (tar, _):
        for name, entry in manifest.entries.items():
            folder = cache.folder / name
            folder.mkdir(exist_ok=True)
            for file, digest in entry.files.items():
                (folder / file).write_bytes(_read(tar, f"{name}/{file}", digest)[0])
            link(folder, entry)
            cache.manifest.entries[name] = entry
        cache.manifest.write(cache.folder)
    return len(manifest.entries)


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[tarfile.TarFile, Manifest]]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            file = tar.extractfile(NAME)
            assert file is not None
            yield tar, Manifest.parse(file.read())
    except OSError as error:
        raise ConfigError(f"{archive}: {error.strerror or error}") from None
    except (tarfile.TarError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{archive} is no archive of compiled kernels: {error}") from None


def _read(tar: tarfile.TarFile, name: str, digest: str) -> tuple[bytes, str | None]:
    """Returns a file of the archive, and what is wrong with it."""
    try:
        file = tar.extractfile(name)
    except KeyError:
        return b"", "missing"
    data = b"" if file is None else file.read()
    return data, None if hashlib.sha256(data).hexdigest() == digest else "damaged"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size, about.mode = len(data), 0o644
    tar.addfile(about, io.BytesIO(data))
