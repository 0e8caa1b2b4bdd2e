"""The folder of one running deployment, with its sockets, its deployment.json and a lock. The
launcher holds the lock as long as it lives; other commands find the deployment by it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from crosspool.config.deployment import ConfigError, Deployment, load

_LOCK = "launcher.lock"
_SOCKET_PATH_LIMIT = 107
_LONGEST_SOCKET_NAME = 32


def _prefix() -> str:
    return f"crosspool-{os.getuid()}-"


class RuntimeDir:
    """Makes the folder (mode 0700), and removes it in :meth:`close`.

    Raises ConfigError when its path is too long for the names of Unix sockets."""

    def __init__(self) -> None:
        remove_stale()
        self.path = Path(tempfile.mkdtemp(prefix=_prefix()))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        if len(str(self.path)) + 1 + _LONGEST_SOCKET_NAME > _SOCKET_PATH_LIMIT:
            self.close()
            raise ConfigError(
                f"{self.path} is too long a path for sockets: set TMPDIR to a shorter one"
            )

    def close(self) -> None:
        os.close(self._lock)
        shutil.rmtree(self.path)


def _is_locked(folder: Path) -> bool:
    """Whether a launcher holds the folder's lock."""
    try:
        fd = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _folders() -> Iterator[Path]:
    for path in sorted(Path(tempfile.gettempdir()).glob(_prefix() + "*")):
        status = path.lstat()
        if path.is_dir() and not path.is_symlink() and status.st_uid == os.getuid():
            yield path


def remove_stale() -> None:
    """Removes the folders of launchers that were killed before they could clean up."""
    for folder in _folders():
        if (folder / _LOCK).exists() and not _is_locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def find_running(port: int | None = None) -> Deployment:
    """Returns the deployment that this user runs on this machine, on ``port`` if given.

    Raises ConfigError when there is none, or several and no ``port`` to choose by."""
    found = [
        load(folder / "deployment.json")
        for folder in _folders()
        if (folder / "deployment.json").exists() and _is_locked(folder)
    ]
    if port is not None:
        found = [deployment for deployment in found if deployment.port == port]
    if not found:
        where = "" if port is None else f" on port {port}"
        raise ConfigError(f"no CrossPool server of this user runs on this machine{where}")
    if len(found) > 1:
        ports = ", ".join(str(deployment.port) for deployment in found)
        raise ConfigError(f"several servers run on this machine: choose one with --port ({ports})")
    return found[0]
