"""A folder of packed weights, which outlive the process that packed them.

Each file has a name of its own for the weights and the form that they are in. It is written under
another name, with its room reserved, and renamed when all of it is on the disk. A lock on a file
that is being written keeps other writers off, and a lock on the folder those that make room. Files
that were not used for longest go first; those that this server has used stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config.sizes import format_size

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment

log = logging.getLogger(__name__)

_WHOLE, _PART = ".packed", ".part"


def default_folder() -> Path:
    """Returns the folder of packed weights of a user who names none."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "crosspool"


def folder_of(deployment: Deployment) -> Path:
    """Returns the folder of packed weights of a deployment."""
    given = deployment.packed_cache_dir
    return default_folder() if given is None else Path(given).expanduser().absolute()


class Unusable(Exception):
    """The folder, or its room, cannot be used; the message says why."""


class PackedCache:
    """The files of a folder; see this module's docstring."""

    def __init__(self, folder: Path, max_bytes: int, since_ns: int) -> None:
        """``max_bytes``: bound of all files together. ``since_ns``: the time at which this server
        began, in ns since 1970; files that were used later are not given up.

        Raises Unusable for a folder that cannot be made, or that others may write to."""
        self.folder = folder
        self._max_bytes = max_bytes
        self._since_ns = since_ns
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise Unusable(f"{folder} cannot be used: {error.strerror}") from None
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise Unusable(f"{folder} belongs to another user, or others may write to it")

    def path(self, name: str) -> Path:
        """Where the file of a name is, or will be."""
        return self.folder / f"{name}{_WHOLE}"

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int | None]:
        """Opens a file for reading and notes that it was used; None when there is none."""
        try:
            file = os.open(self.path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        try:
            with contextlib.suppress(OSError):
                os.utime(file)
            yield file
        finally:
            os.close(file)

    def is_being_written(self, name: str) -> bool:
        """Whether another process writes a file now."""
        part = self.folder / f"{name}{_PART}"
        with self._locked():  # who looks would keep off who wants to begin
            return part.exists() and not _is_left_behind(part)

    def discard(self, name: str) -> None:
        """Removes a file, if it is there."""
        with contextlib.suppress(OSError):
            self.path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def begun(self, name: str, nbytes: int) -> Iterator[NewFile | None]:
        """Begins a file of ``nbytes``, and removes it at the end unless it was published. None when
        another process writes it now, or has written it.

        Raises Unusable when there is no room, and OSError."""
        with self._locked():
            new = self._begin(name, nbytes)
        if new is None:
            yield None
            return
        try:
            yield new
        finally:
            with self._locked():
                new.part.unlink(missing_ok=True)
                os.close(new.file)

    def publish(self, new: NewFile) -> None:
        """Gives the file its name, once all of it is on the disk. Raises OSError."""
        os.fsync(new.file)
        with self._locked() as folder:
            new.part.rename(new.part.with_suffix(_WHOLE))
            os.fsync(folder)

    def _begin(self, name: str, nbytes: int) -> NewFile | None:
        part = self.folder / f"{name}{_PART}"
        file = None if self.path(name).exists() else _take(part)
        if file is None:
            return None
        try:
            os.ftruncate(file, 0)
            self._make_room(nbytes, part)
            os.posix_fallocate(file, 0, nbytes)
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(file)
            raise
        return NewFile(file, part)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Keeps other processes from naming files meanwhile; yields the folder's descriptor."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(folder)

    def _make_room(self, nbytes: int, part: Path) -> None:
        """Removes what dead writers have left, and files that were not used for longest, until
        ``nbytes`` more are within the bound. Raises Unusable where that is not enough."""
        kept: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            if path.suffix == _PART and path != part and _is_left_behind(path):
                path.unlink(missing_ok=True)
            elif path.suffix in (_WHOLE, _PART):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    kept.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in kept)
        for used_ns, size, path in sorted(kept):
            if total + nbytes <= self._max_bytes:
                break
            if path.suffix == _WHOLE and used_ns < self._since_ns:
                log.info("%s makes room for other packed weights", path)
                path.unlink(missing_ok=True)
                total -= size
        if total + nbytes > self._max_bytes:
            raise Unusable(
                f"{format_size(nbytes)} beside the {format_size(total)} that this server has there "
                f"are more than packed_cache_bytes, {format_size(self._max_bytes)}"
            )
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if nbytes > free // 2:
            raise Unusable(
                f"{format_size(nbytes)} would take more than half of the {format_size(free)} that "
                f"are free in {self.folder}"
            )


@dataclass(frozen=True)
class NewFile:
    """A file that is being written."""

    file: int
    """Its descriptor."""
    part: Path
    """Where it is until it is published."""


def _take(part: Path) -> int | None:
    """Opens a file for writing and locks it; None when another process has locked it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(part, flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return file


def _is_left_behind(part: Path) -> bool:
    """Whether nobody writes the file any more."""
    try:
        file = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
