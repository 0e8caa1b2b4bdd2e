"""What a server holds of the machine: memory, descriptors, shared memory, files, KV memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmark.chaos.faults import title_of

MEMORY_ROOM = 64 << 20
DESCRIPTOR_ROOM = 16
THREAD_ROOM = 8
"""How much of each a process may have gained, or the one in its place: connections come and go,
caches fill."""
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Held:
    """What one process holds, or all with one title together."""

    memory: int
    """Bytes of resident memory. Whoever measures it says what of shared memory counts."""
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Holdings:
    """What a server holds at a moment."""

    processes: dict[str, Held]
    """What each process holds; the keys are titles."""
    folders: tuple[str, ...]
    """Runtime folders, and the files in each."""
    shared: frozenset[str]
    """Objects of shared memory, of the whole machine."""

    @property
    def total(self) -> Held:
        held = self.processes.values()
        return Held(
            sum(one.memory for one in held),
            sum(one.descriptors for one in held),
            sum(one.threads for one in held),
        )

    def growth(self, before: Holdings) -> Iterator[str]:
        """Yield a line for everything that has grown since ``before`` and should not have."""
        if self.processes.keys() != before.processes.keys():
            yield f"processes {sorted(self.processes)} instead of {sorted(before.processes)}"
        for title in self.processes.keys() & before.processes.keys():
            now, then = self.processes[title], before.processes[title]
            if now.memory > then.memory + MEMORY_ROOM:
                yield f"{title}: {now.memory >> 20} MiB, before {then.memory >> 20}"
            if now.descriptors > then.descriptors + DESCRIPTOR_ROOM:
                yield f"{title}: {now.descriptors} descriptors, before {then.descriptors}"
            if now.threads > then.threads + THREAD_ROOM:
                yield f"{title}: {now.threads} threads, before {then.threads}"
        if self.folders != before.folders:
            grown = Counter(self.folders) - Counter(before.folders)
            gone = Counter(before.folders) - Counter(self.folders)
            yield f"runtime folders: new {sorted(grown)}, gone {sorted(gone)}"
        if orphans := _orphans(self.shared - before.shared):
            yield f"shared memory of nobody: {sorted(orphans)}"


def measure(launcher: psutil.Process, folder: Path) -> Holdings:
    """Return what the server of ``launcher`` holds now, whose runtime folders lie in ``folder``."""
    processes: dict[str, Held] = {}
    for process in (launcher, *launcher.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = title_of(process)
            memory = process.memory_info().rss
            held = Held(memory, process.num_fds(), process.num_threads())
            while title in processes:
                title += " (one more)"
            processes[title] = held
    return Holdings(processes, tuple(_names(folder)), frozenset(os.listdir(_SHM)))


def _names(folder: Path) -> Iterator[str]:
    """Names below ``folder``, in order. A new detokenizer has sockets of its own, which count as
    those of the one before."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    yield from sorted(re.sub(r"\.detok\.\d+$", ".detokenizer", name) for name in names)


def _orphans(names: frozenset[str]) -> set[str]:
    """Those of the objects that lie in shared memory, belong to this user, and that no process has
    open."""
    paths = {str(_SHM / name) for name in names}
    mine = set()
    for path in paths:
        with contextlib.suppress(OSError):
            if os.stat(path).st_uid == os.getuid():
                mine.add(path)
    return mine - (_open_paths() if mine else set())


def _open_paths() -> set[str]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found |= {file.path for file in process.open_files()}
            found |= {region.path for region in process.memory_maps()}
    return found
