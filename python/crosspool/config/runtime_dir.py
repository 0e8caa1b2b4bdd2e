"""The folder of one running deployment, with its sockets, its deployment.json and a lock. The
launcher holds the lock as long as it lives; other commands find the deployment by it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from crosspool.config.deployment import ConfigError, Deployment, load

_LOCK = "launcher.lock"
_SOCKET_PATH_LIMIT = 107
_LONGEST_SOCKET_NAME = 32
_BYTES = 1 << 20
"""Room that deployment.json and SGLang's metrics must find."""
_FILES = 32
_FILES_PER_MODEL = 8
"""Sockets of the deployment and of each model, and more."""


def _parent() -> Path:
    """The folder of all runtime folders. A TMPDIR that is set is never silently replaced by
    another folder, as :mod:`tempfile` does when it cannot write there: others look for the server
    in TMPDIR, too. Raises ConfigError where there is none."""
    given = os.environ.get("TMPDIR")
    try:
        return Path(given or tempfile.gettempdir()).absolute()
    except FileNotFoundError as error:
        raise ConfigError(f"{error.strerror}: set TMPDIR to a folder with free space") from None


def _prefix() -> str:
    return f"crosspool-{os.getuid()}-"


class _Address(msgspec.Struct):
    """What is read of the servers that are not looked for, which may be of other versions."""

    port: int
    node_rank: int = 0
    """Number of the host; the folder of another host's launcher is none of a server."""


class RuntimeDir:
    """Makes the folder (mode 0700) for a deployment of ``models`` models, and removes it in
    :meth:`close`.

    Raises ConfigError when no folder can be made, when it has no room for the deployment's files,
    or when its path is too long for the names of Unix sockets."""

    def __init__(self, models: int = 1) -> None:
        parent = _parent()
        remove_stale()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
        except OSError as error:
            raise _unusable(parent, error) from None
        try:
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._check(_FILES + _FILES_PER_MODEL * models)
        except BaseException as error:
            shutil.rmtree(self.path)
            if isinstance(error, OSError):
                raise _unusable(parent, error) from None
            raise

    def _check(self, files: int) -> None:
        """Raises ConfigError when the path is too long, OSError when there is no room."""
        if len(os.fsencode(self.path)) + 1 + _LONGEST_SOCKET_NAME > _SOCKET_PATH_LIMIT:
            raise ConfigError(
                f"{self.path} is too long a path for sockets: set TMPDIR to a shorter one"
            )
        with tempfile.TemporaryDirectory(dir=self.path) as folder:
            for number in range(files):
                (Path(folder) / str(number)).touch()
            with (Path(folder) / "bytes").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, _BYTES)

    def close(self) -> None:
        os.close(self._lock)
        shutil.rmtree(self.path)


def metrics_folder(deployment: Deployment) -> Path:
    """The folder of the files through which processes share SGLang's metrics, each named by its
    writer's pid: see prometheus_client's multiprocess mode."""
    return Path(deployment.runtime_dir) / "metrics"


def remove_metrics(deployment: Deployment, pid: int) -> None:
    """Removes what a process that has ended told of its metrics. Gauges of it would be shown for
    ever, and its counters start anew with the process that takes its place."""
    for file in metrics_folder(deployment).glob(f"*_{pid}.db"):
        file.unlink()


def _unusable(parent: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the server's files cannot be made in {parent}: {error.strerror}: make room there, or set "
        "TMPDIR to another folder"
    )


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
    for path in sorted(_parent().glob(_prefix() + "*")):
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

    Raises ConfigError when there is none, or several and no ``port`` to choose by, or when it is of
    another version of CrossPool."""
    files = [
        folder / "deployment.json"
        for folder in _folders()
        if (folder / "deployment.json").exists() and _is_locked(folder)
    ]
    told = {file: msgspec.json.decode(file.read_bytes(), type=_Address) for file in files}
    ports = {file: address.port for file, address in told.items() if address.node_rank == 0}
    found = [file for file in ports if port in (None, ports[file])]
    if not found:
        where = "" if port is None else f" on port {port}"
        raise ConfigError(f"no CrossPool server of this user runs on this machine{where}")
    if len(found) > 1:
        known = ", ".join(str(ports[file]) for file in found)
        raise ConfigError(f"several servers run on this machine: choose one with --port ({known})")
    try:
        return load(found[0])
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"the server on port {ports[found[0]]} is of another version of CrossPool: {error}"
        ) from None
