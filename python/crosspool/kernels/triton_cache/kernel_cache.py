"""A folder of compiled kernels that Triton finds them in: opened under a lock, checked, and filled
by many processes at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from crosspool.config.errors import ConfigError
from crosspool.config.process import die_with_parent
from crosspool.kernels.triton_cache.host_modules import HostModule
from crosspool.kernels.triton_cache.launches import Launch
from crosspool.kernels.triton_cache.manifest import CacheEntry, Identity, Manifest, digests
from crosspool.kernels.triton_cache.toolchain import Toolchain

log = logging.getLogger(__name__)

Task = Launch | HostModule
_LOCK = "crosspool-kernels.lock"
_LOCK_PATIENCE = 1800.0
"""Longest wait for another process that fills the same folder, in seconds."""
_KERNEL_PATIENCE = 300.0
"""Longest time in which no kernel is done, in seconds."""
_WORKER_BYTES = 768 << 20
"""Memory for a process that compiles; it takes about 400 MiB."""


class CompileError(RuntimeError):
    """Kernels could not be compiled; the message names them."""


class KernelCache:
    """The compiled kernels of one folder, for one Triton."""

    def __init__(self, folder: Path, toolchain: Toolchain) -> None:
        self.folder = folder.absolute()
        self.toolchain = toolchain
        self.identity = Identity.of(toolchain)
        self.manifest = Manifest(self.identity)

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[str]]:
        """Holds the folder alone, made where it is not there. Yields what was wrong with it, by
        name; those entries are gone.

        Raises ConfigError for a folder that cannot be written, or that another process does not
        let go."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(
                f"the folder of compiled kernels {self.folder}: {error.strerror}; name another one "
                "in TRITON_CACHE_DIR"
            ) from None
        try:
            _take(lock, self.folder)
            yield self._read()
        finally:
            os.close(lock)

    def _read(self) -> list[str]:
        self.manifest = Manifest(self.identity)
        try:
            found = Manifest.read(self.folder)
        except ValueError as error:
            return [str(error)]
        if found is None:
            return []
        if different := self.identity.differences(found.identity):
            reason = f"{len(found.entries)} kernels are foreign: {', '.join(different)}"
            found.drop(self.folder, found.entries)
            return [reason]
        self.manifest = found
        damaged = found.damaged(self.folder)
        found.drop(self.folder, damaged)
        for name, entry in found.entries.items():
            link(self.folder / name, entry)
        return list(damaged.values())

    def missing(self, wanted: Mapping[str, Task]) -> dict[str, Task]:
        """Returns those of ``wanted`` (by entry) that are not in the folder."""
        return {name: task for name, task in wanted.items() if name not in self.manifest.entries}

    def fill(
        self,
        tasks: Mapping[str, Task],
        models: Mapping[str, Sequence[str]],
        workers: int,
        on_done: Callable[[str], None],
    ) -> None:
        """Compiles ``tasks``, by entry, in ``workers`` processes; ``on_done`` is called with the
        entry of each one that is done. ``models``: for which models an entry is.

        Raises CompileError that names those that failed, once the others are done."""
        failed: list[str] = []
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(workers, len(tasks)),
            mp_context=context,
            initializer=_begin,
            initargs=(self.folder, self.toolchain),
        )
        try:
            pending: dict[Future[dict[str, str]], str] = {
                pool.submit(_compile, self.folder, name, task): name for name, task in tasks.items()
            }
            while pending:
                done, _ = wait(pending, _KERNEL_PATIENCE, FIRST_COMPLETED)
                if not done:
                    left = ", ".join(sorted({tasks[name].kernel for name in pending.values()}))
                    raise CompileError(
                        f"no kernel was compiled in {_KERNEL_PATIENCE:.0f} s; left are {left}"
                    )
                for future in done:
                    name = pending.pop(future)
                    task = tasks[name]
                    try:
                        files = future.result()
                    except BrokenProcessPool:
                        raise CompileError(
                            "a process that compiles was killed, perhaps for want of memory; "
                            f"{len(pending) + 1} kernels are left"
                        ) from None
                    except Exception as error:
                        failed.append(f"{task.kernel} of {', '.join(models[name])}: {error}")
                        continue
                    capability = task.capability if isinstance(task, Launch) else None
                    entry = CacheEntry(task.kernel, capability, tuple(models[name]), files)
                    self.manifest.entries[name] = entry
                    self.manifest.write(self.folder)
                    on_done(name)
        finally:
            _end(pool)
        if failed:
            raise CompileError("these kernels do not compile: " + "; ".join(failed))


def link(folder: Path, entry: CacheEntry) -> None:
    """Writes the file by which Triton finds a kernel's files: it holds their paths."""
    for name in entry.files:
        if name.endswith(".json"):
            paths = {file: str(folder / file) for file in entry.files}
            group = folder / f"__grp__{name}"
            text = json.dumps({"child_paths": paths})
            if not group.is_file() or group.read_text() != text:
                group.write_text(text)


def worker_count() -> int:
    """Returns the number of processes that compile: one for each core, if there is memory."""
    import psutil

    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(psutil.virtual_memory().available) // _WORKER_BYTES))


def _take(lock: int, folder: Path) -> None:
    deadline, told = time.monotonic() + _LOCK_PATIENCE, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                told = True
                log.info("waiting for another process that compiles kernels into %s", folder)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{folder}: another process has compiled kernels into it for "
                    f"{_LOCK_PATIENCE / 60:.0f} minutes; end it, or name another folder in "
                    "TRITON_CACHE_DIR"
                ) from None
            time.sleep(0.05)


def _begin(folder: Path, toolchain: Toolchain) -> None:
    """Begins a process that compiles."""
    from triton import knobs

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whom it is meant for ends this process
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    knobs.compilation.store_binary_only = True
    toolchain.use()


def _compile(folder: Path, name: str, task: Task) -> dict[str, str]:
    """Returns the SHA-256 of each file of the entry."""
    own = folder / name
    if isinstance(task, HostModule):
        return digests(task.make(own))
    task.compile()
    return digests(own / f"{task.kernel}.{kind}" for kind in ("cubin", "json"))


def _end(pool: ProcessPoolExecutor) -> None:
    """Ends the processes at once; none of them holds anything that is worth waiting for."""
    workers = list(pool._processes.values()) if pool._processes else []
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(10.0)
