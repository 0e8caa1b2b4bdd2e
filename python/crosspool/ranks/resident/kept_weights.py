"""Weights in packed form that outlive the process: read by the threads that compute with them, and
written by a child process that yields to all others, since a thread would sometimes keep the
interpreter from those that carry messages."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import msgspec
from torch import Tensor

from crosspool.config.errors import ConfigError
from crosspool.config.process import die_with_parent, leave, set_title
from crosspool.config.sizes import format_size
from crosspool.kernels import engine_structs as es
from crosspool.kernels import native
from crosspool.kernels import native_structs as ns
from crosspool.kernels.engine import Team, set_checksums
from crosspool.kernels.isa import default_isa
from crosspool.models.gguf_config import config_of
from crosspool.models.spec import TensorRef
from crosspool.ranks.resident.arena import round_up
from crosspool.weightpool import packed_file
from crosspool.weightpool.checkpoint import Checkpoint, warn_of_broken
from crosspool.weightpool.packed_cache import PackedCache, Unusable
from crosspool.weightpool.packed_file import DamagedFile, PackedMatrix, PackedTable

log = logging.getLogger(__name__)

_LAYOUT = 1
"""Counts changes of what the files hold that neither the native library nor a declaration shows."""
_LINE = 64
_PIECE_BYTES = 64 << 20
"""Bytes that are written at a time and brought to the disk, so that not much waits to be."""
_LOWEST_PRIORITY = 19
_NAME_DIGITS = 32


@dataclass(frozen=True)
class Form:
    """Which weights a part of a model holds, and in which form."""

    checkpoint: Checkpoint
    refs: tuple[TensorRef, ...]
    declared: Any
    """Matrices, arrays, and the tensors that fill them, in order, as JSON can hold them."""

    def key(self) -> str:
        """Returns a digest that changes with the checkpoint's files, what is taken from them, the
        native library, and the instruction set that weights are packed for.

        Raises ConfigError when a file cannot be read."""
        fields = msgspec.json.encode(config_of(self.checkpoint.path).values, order="deterministic")
        identity = (
            _LAYOUT,
            _library_digest(),
            default_isa(),
            hashlib.sha256(fields).hexdigest(),
            self.checkpoint.identity(self.refs),
            self.declared,
        )
        return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()


@dataclass(frozen=True)
class Image:
    """Where packed weights lie in memory."""

    arena: int
    bytes: int
    """Bytes of the arena that matrices take."""
    room: int
    """Bytes of the arena."""
    matrices: Sequence[ns.Matrix]
    arrays: Sequence[Tensor]
    stages: Sequence[int]
    """Stages of the matrices, then of the arrays: in their order they are read while others run."""
    on_demand: Sequence[bool]
    """Which of the matrices are no part of the arena, since they are read on demand."""


class WeightKeeper:
    """Finds the packed weights of one device in a cache, and keeps there what it did not find."""

    def __init__(self, cache: PackedCache) -> None:
        self._cache = cache
        self._jobs: list[_Job] = []
        self._child = 0
        """Pid of the process that writes; 0: there is none."""

    def of(self, name: str) -> KeptWeights:
        """Returns what is kept of a part of a model; ``name`` begins the name of its file."""
        return KeptWeights(self._cache, name, self._jobs)

    def start(self) -> None:
        """Has a child process write what was packed, which ends with this process. Call it in the
        main thread. Raises OSError when there can be none."""
        if not self._jobs:
            return
        signal.signal(signal.SIGCHLD, lambda number, frame: self._reap())
        self._child = os.fork()
        if self._child == 0:
            die_with_parent()
            set_title("keeper of packed weights")
            os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_PRIORITY)
            self.write()
            leave(0)
        self._reap()
        self._jobs.clear()

    def _reap(self) -> None:
        """Lets the child process go, if it has ended. Processes that are forked later are not its
        parent."""
        with contextlib.suppress(ChildProcessError):
            if self._child and os.waitpid(self._child, os.WNOHANG)[0]:
                self._child = 0

    def write_now(self) -> None:
        """Writes what was packed. Raises Unusable, ConfigError, OSError."""
        while self._jobs:
            self._jobs.pop().write()

    def write(self) -> None:
        """Writes what was packed. Where that is not possible, a warning says why."""
        for job in self._jobs:
            try:
                job.write()
            except (Unusable, ConfigError) as error:
                log.warning("the packed weights of %s are not kept: %s", job.name, error)
            except OSError as error:
                reason = error.strerror or str(error)
                log.warning("the packed weights of %s are not kept: %s", job.name, reason)


@dataclass(frozen=True)
class KeptWeights:
    """The packed weights of one part of a model, as a cache may have them."""

    _cache: PackedCache
    _name: str
    _jobs: list[_Job]

    def open(self, key: str, image: Image, known: PackedLayout | None = None) -> OpenWeights | None:
        """Opens the file of ``key`` and tells the matrices of ``image`` where they will lie; None
        when the cache does not have it, or a damaged file, which is removed. No weights are read.
        ``known``: the layout of an earlier file of the same key and image."""
        name = _file_name(self._name, key)
        with self._cache.opened(name) as file:
            if file is None:
                return None
            try:
                head = packed_file.read_head(file)
                if known is None or known.head != head:
                    table, begin = packed_file.read(file, key)
                    known = PackedLayout(head, table, placed(table, image), begin)
            except (DamagedFile, OSError) as error:
                self.discard(key, error)
                return None
            return OpenWeights(os.dup(file), known)

    def discard(self, key: str, error: Exception) -> None:
        """Removes a damaged file, and logs why."""
        name = _file_name(self._name, key)
        path = self._cache.path(name)
        log.warning("%s is removed: %s; the weights are packed anew", path, error)
        self._cache.discard(name)

    def is_being_written(self, key: str) -> bool:
        """Whether another process writes the file of ``key``."""
        return self._cache.is_being_written(_file_name(self._name, key))

    def touch(self, key: str) -> bool:
        """Notes that the file of ``key`` is still needed; returns whether there is one."""
        with self._cache.opened(_file_name(self._name, key)) as file:
            return file is not None

    def read(self, form: Form, image: Image, team: Team) -> Image | None:
        """Fills matrices and arrays, and returns the image with its bytes; None when the cache does
        not have them, or a damaged file, which is removed.

        Raises ConfigError when the checkpoint cannot be read."""
        key = form.key()
        opened = self.open(key, image)
        if opened is None:
            return None
        with opened:
            try:
                opened.read(team)
            except (DamagedFile, OSError) as error:
                self.discard(key, error)
                return None
        warn_of_broken(form.checkpoint.path, opened.layout.table.broken)
        return opened.layout.image

    def keep_later(self, form: Form, image: Image, broken: Sequence[str]) -> None:
        """Notes what :meth:`WeightKeeper.write` shall write."""
        self._jobs.append(_Job(self._cache, self._name, form, form.key(), image, broken))


@dataclass(frozen=True)
class PackedLayout:
    """Where the weights of a file lie, in it and in memory."""

    head: bytes
    """The file's head."""
    table: PackedTable
    image: Image
    begin: int
    """Place in the file at which the weights begin, in bytes."""

    @functools.cached_property
    def spans(self) -> ctypes.Array[es.Span]:
        """Matrices that are not on demand, then arrays, as they lie in the file and in memory."""
        offsets = [packed.offset for packed in self.table.matrices]
        return _spans(self.image, self.begin, offsets, self.table.arena_bytes)

    @property
    def checksums(self) -> list[int]:
        """What the spans must have when they have been read."""
        return self._of_spans([packed.checksum for packed in self.table.matrices]) + (
            self.table.arrays
        )

    @property
    def stages(self) -> list[int]:
        """The stages of the spans."""
        return self._of_spans(self.image.stages)

    def place_of(self, matrix: int) -> tuple[int, int]:
        """Returns where in the file a matrix begins, by its number, and its checksum."""
        packed = self.table.matrices[matrix]
        return self.begin + packed.offset, packed.checksum

    def _of_spans(self, of_all: Sequence[int]) -> list[int]:
        """What there is for matrices and perhaps arrays, without the matrices on demand."""
        matrices = len(self.image.matrices)
        of_matrices = zip(of_all[:matrices], self.image.on_demand, strict=True)
        return [one for one, on_demand in of_matrices if not on_demand] + list(of_all[matrices:])


@dataclass(frozen=True)
class OpenWeights:
    """A file of packed weights that is open for reading."""

    file: int
    layout: PackedLayout

    def read(self, team: Team) -> None:
        """Reads all weights into memory that are not on demand. Raises DamagedFile, OSError."""
        spans = self.layout.spans
        team.read(self.file, spans)
        found = (span.checksum for span in spans)
        if any(sum_ != right for sum_, right in zip(found, self.layout.checksums, strict=True)):
            raise DamagedFile("its weights have another checksum")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)


def placed(table: PackedTable, image: Image) -> Image:
    """Tells matrices where they lie, and returns the image with its bytes. Raises DamagedFile."""
    counts = len(table.matrices), len(table.arrays)
    if counts != (len(image.matrices), len(image.arrays)):
        raise DamagedFile("it has another number of matrices")
    packs = any(image.on_demand)
    end = table.arena_bytes if packs else image.room
    at = 0
    for matrix, packed, on_demand in zip(
        image.matrices, table.matrices, image.on_demand, strict=True
    ):
        matrix.encoding = packed.encoding
        if not 0 <= packed.offset <= end - matrix.bytes:
            raise DamagedFile("a matrix lies outside the arena")
        if on_demand:  # whoever reads it says where
            continue
        if packs:  # what lies between them in the file has no room here
            matrix.data = image.arena + at
            at += round_up(matrix.bytes, _LINE)
        else:
            matrix.data = image.arena + packed.offset
    if at > image.room:
        raise DamagedFile("its matrices have no room in the arena")
    return replace(image, bytes=at if packs else table.arena_bytes)


@dataclass(frozen=True)
class _Job:
    """Packed weights that shall be kept."""

    cache: PackedCache
    name: str
    form: Form
    key: str
    """Key of the form when the checkpoint had been read."""
    image: Image
    broken: Sequence[str]

    def write(self) -> None:
        """Writes the file. Raises Unusable, ConfigError, OSError."""
        head = packed_file.encode(self._table())
        pieces = list(_pieces(self.image))
        nbytes = len(head) + sum(length for _, length in pieces)
        with self.cache.begun(_file_name(self.name, self.key), nbytes) as new:
            if new is None:
                return
            at = _write_fully(new.file, head, 0)
            for address, length in pieces:
                at = _write_fully(new.file, (ctypes.c_char * length).from_address(address), at)
                os.fdatasync(new.file)
            if self.form.key() != self.key:
                log.warning("%s has changed: it is not kept as packed weights", self.name)
                return
            self.cache.publish(new)
            log.info(
                "%s: %s of packed weights kept in %s",
                self.name,
                format_size(nbytes),
                self.cache.folder,
            )

    def _table(self) -> PackedTable:
        offsets = [(matrix.data or 0) - self.image.arena for matrix in self.image.matrices]
        spans = _spans(self.image, 0, offsets, self.image.bytes)
        set_checksums(spans)
        sums = [span.checksum for span in spans]
        count = len(self.image.matrices)
        return PackedTable(
            key=self.key,
            arena_bytes=self.image.bytes,
            matrices=[
                PackedMatrix(offsets[i], matrix.encoding, sums[i])
                for i, matrix in enumerate(self.image.matrices)
            ],
            arrays=sums[count:],
            weight_bytes=self.image.bytes + sum(array.nbytes for array in self.image.arrays),
            broken=list(self.broken),
        )


def _spans(
    image: Image, begin: int, offsets: Sequence[int], arena_bytes: int
) -> ctypes.Array[es.Span]:
    """Matrices that are not on demand, and arrays, in memory and in a file whose weights begin at
    ``begin``: the matrices at ``offsets`` from there, the arrays behind ``arena_bytes``."""
    spans = []
    for matrix, offset, on_demand in zip(image.matrices, offsets, image.on_demand, strict=True):
        if on_demand:
            continue
        panels = ns.round_up(matrix.n, ns.PANEL) // ns.PANEL
        unit = matrix.bytes // panels
        spans.append(es.Span(matrix.data, begin + offset, 0, unit, panels))
    offset = begin + arena_bytes
    for array in image.arrays:
        rows = array.shape[0] if array.dim() > 1 else 1
        spans.append(es.Span(array.data_ptr(), offset, 0, array.nbytes // rows, rows))
        offset += array.nbytes
    return (es.Span * len(spans))(*spans)


def _pieces(image: Image) -> Iterator[tuple[int, int]]:
    """Address and length of what is written at a time."""
    whole = [(image.arena, image.bytes)]
    whole += [(array.data_ptr(), array.nbytes) for array in image.arrays]
    for address, length in whole:
        for at in range(0, length, _PIECE_BYTES):
            yield address + at, min(_PIECE_BYTES, length - at)


def _write_fully(file: int, data: bytes | ctypes.Array[ctypes.c_char], at: int) -> int:
    """Writes ``data`` at ``at`` and returns where it ends. Raises OSError."""
    left = memoryview(data).cast("B")
    while left:
        done = os.pwrite(file, left, at)
        left, at = left[done:], at + done
    return at


def _file_name(name: str, key: str) -> str:
    return f"{name}.{key[:_NAME_DIGITS]}"


@functools.cache
def _library_digest() -> str:
    """Digest of the native library, whose code decides how weights are packed."""
    return hashlib.sha256(Path(native.library()._name).read_bytes()).hexdigest()
