"""The face of the native engine: a team of threads, and the resident loop that runs on it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import byref
from types import TracebackType
from typing import Self

from crosspool.kernels import engine_structs as es
from crosspool.kernels import native
from crosspool.kernels import native_structs as ns


class EngineError(RuntimeError):
    """The native engine cannot go on; its message says why."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library()
    native.declare(library, es.SIGNATURES)
    sizes = (ctypes.c_uint64 * len(es.MIRRORED))()
    library.crosspool_engine_sizes(sizes, len(sizes))
    for structure, size in zip(es.MIRRORED, sizes, strict=True):
        if ctypes.sizeof(structure) != size:
            raise ImportError(
                f"{native.LIBRARY} has {size} bytes for {structure.__name__}, not"
                f" {ctypes.sizeof(structure)}: build it again with `pip install -e .`"
            )
    return library


def _created(address: int | None) -> int:
    if address is None:
        raise EngineError(_library().crosspool_error().decode())
    return address


def set_checksums(spans: ctypes.Array[es.Span]) -> None:
    """Sets the checksums of spans from memory, as :meth:`Team.read` does, in the calling thread."""
    _library().crosspool_checksums(spans, len(spans))


class Team:
    """A device's threads, one per core, which sleep while nothing runs."""

    def __init__(self, cores: Sequence[int]) -> None:
        """Starts a thread for each of ``cores``, pinned to it; -1 stands for a thread that is not
        pinned. Raises EngineError when a core does not exist."""
        numbers = (ctypes.c_int32 * len(cores))(*cores)
        self._native = _library()
        self.address = _created(self._native.crosspool_team_create(numbers, len(cores)))
        self.size = len(cores)

    def pack(self, matrix: ns.Matrix, sources: Sequence[ns.Source]) -> None:
        """Packs the rows of ``sources``, one source after another along n, into ``matrix.data``."""
        array = (ns.Source * len(sources))(*sources)
        self._native.crosspool_team_pack(self.address, byref(matrix), array, len(sources))

    def pack_gated(self, matrix: ns.Matrix, gate: ns.Source, up: ns.Source) -> None:
        """Packs a gated MLP's gate and up into ``matrix.data``."""
        self._native.crosspool_team_pack_gated(self.address, byref(matrix), byref(gate), byref(up))

    def pack_grouped(self, matrix: ns.Matrix, source: ns.CodeSource) -> None:
        """Packs codes, scales and offsets into ``matrix.data``."""
        self._native.crosspool_team_pack_grouped(self.address, byref(matrix), byref(source))

    def read(self, file: int, spans: ctypes.Array[es.Span]) -> None:
        """Reads spans from an open file into memory, each thread those units that it packs
        otherwise, and sets their checksums.

        Raises OSError when the file cannot be read, or ends too early."""
        status = self._native.crosspool_team_read(self.address, file, spans, len(spans))
        if status < 0:
            raise OSError(-status, os.strerror(-status))

    def close(self) -> None:
        """Ends the threads. Loops on the team must be closed before."""
        if self.address:
            self._native.crosspool_team_free(self.address)
            self.address = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class NativeExpertPool:
    """Memory in which routed experts lie that are read on demand, with the threads that read
    them. Loops whose description names its :attr:`address` must be closed before it."""

    def __init__(
        self, memory: int, nbytes: int, *, cores: Sequence[int], readers: int, models: int
    ) -> None:
        """``memory``: address of ``nbytes`` that nobody else uses. ``cores``: where the ``readers``
        threads may run. ``models``: numbers of models are below. Raises EngineError when a core
        does not exist."""
        self._native = _library()
        numbers = (ctypes.c_int32 * len(cores))(*cores)
        self.address = _created(
            self._native.crosspool_experts_create(
                memory, nbytes, numbers, len(cores), readers, models
            )
        )

    def add(self, model: int, file: int, experts: ctypes.Array[es.PooledExpert]) -> None:
        """Adds the experts of a model, which are in an open file; it is duplicated. The experts of
        a layer follow one another as in its tables, and what they point to outlives them.

        Raises OSError, with ENOSPC when those of a layer do not fit together."""
        status = self._native.crosspool_experts_add(
            self.address, model, file, experts, len(experts)
        )
        if status < 0:
            raise OSError(-status, os.strerror(-status))

    def remove(self, model: int) -> None:
        """Takes the experts of a model, which no loop uses any more."""
        self._native.crosspool_experts_remove(self.address, model)

    def failed(self) -> int:
        """Returns a model of which an expert could not be read, which is told once; -1 if there is
        none."""
        return int(self._native.crosspool_experts_failed(self.address))

    def counters(self, model: int) -> es.NativeExpertCounters:
        """Returns what has happened since the model was added; zeros if it is not there."""
        counters = es.NativeExpertCounters()
        self._native.crosspool_experts_counters(self.address, model, byref(counters))
        return counters

    def close(self) -> None:
        """Ends the threads."""
        if self.address:
            self._native.crosspool_experts_free(self.address)
            self.address = 0


class Loop:
    """A running resident loop. The caller keeps what its description points to."""

    def __init__(self, team: Team, description: es.LoopDescription) -> None:
        """Raises EngineError when the tables contradict each other."""
        self._native = _library()
        self._team = team
        self._address = _created(
            self._native.crosspool_loop_create(team.address, byref(description))
        )

    def push_step(self, arguments: es.StepArguments) -> None:
        """Queues a step. Its arguments must stay in place until its ``DONE``."""
        self._push(es.Command(es.STEP, 0, arguments.step, ctypes.addressof(arguments), 0))

    def push_resume(self, lane: int, step: int) -> None:
        """Lets a lane go on once the host is done with its logits."""
        self._push(es.Command(es.RESUME, lane, step, None, 0))

    def push_recall(self, step: int) -> None:
        """Ends a step's lease, if it still has one, after its step that is under way or comes
        next."""
        self._push(es.Command(es.RECALL, 0, step, None, 0))

    def push_close(self, model: int, *, refuse: bool) -> None:
        """Has the loop read no weights of a model from now on, which it confirms with ``CLOSED``.
        What needs them is refused, or waits until they are there again."""
        self._push(es.Command(es.CLOSE, model, 0, int(refuse), 0))

    def push_add(self, model: int, table: es.ModelTable) -> None:
        """Has the loop take a further model, which it confirms with ``ADDED``. The table must stay
        in place until then, and what it points to until ``REMOVED``."""
        self._push(es.Command(es.ADD, model, 0, ctypes.addressof(table), 0))

    def push_remove(self, model: int) -> None:
        """Has the loop forget a model of which nothing is under way, which it confirms with
        ``REMOVED``."""
        self._push(es.Command(es.REMOVE, model, 0, None, 0))

    def set_present(self, model: int, part: int, layers: int) -> None:
        """Tells that the weights of the first ``layers`` layers of a part of a model are there. The
        attention part has one layer more, the LM head."""
        self._native.crosspool_loop_set_present(self._address, model, part, layers)

    def read(self, reading: es.StagedReading) -> None:
        """Reads weights, stage after stage, and tells the loop of each, in a thread that yields to
        all others; returns at the end.

        Raises OSError when a file cannot be read; its errno is EBADMSG where the weights have
        another checksum, ENODATA where a file ends too early, and ECANCELED after
        ``reading.stop`` was set."""
        status = self._native.crosspool_loop_read(self._address, byref(reading))
        if status < 0:
            raise OSError(-status, os.strerror(-status))

    def pop(self) -> es.Event | None:
        """Takes the next event; None when there is none. Raises EngineError when the loop cannot
        go on."""
        event = es.Event()
        if not self._native.crosspool_loop_pop(self._address, byref(event)):
            return None
        if event.kind == es.FAILED:
            assert event.address is not None
            raise EngineError(ctypes.string_at(event.address).decode())
        return event

    @property
    def last_served_ns(self) -> int:
        """CLOCK_MONOTONIC time of the last reply to another device, in ns; 0 before the first."""
        return int(self._native.crosspool_loop_last_served(self._address))

    def trace_start(self) -> None:
        self._native.crosspool_loop_trace_start(self._address)

    def trace_stop(self, room: int) -> list[es.TraceEvent]:
        """Ends recording; returns the latest ``room`` events, oldest first."""
        events = (es.TraceEvent * room)()
        count = self._native.crosspool_loop_trace_stop(self._address, events, room)
        return list(events[:count])

    def close(self) -> None:
        """Ends the loop after the part that is under way. Steps in flight are lost."""
        if self._address:
            self._native.crosspool_loop_free(self._address)
            self._address = 0

    def _push(self, command: es.Command) -> None:
        if not self._native.crosspool_loop_push(self._address, byref(command)):
            raise EngineError("the loop's command ring is full")
