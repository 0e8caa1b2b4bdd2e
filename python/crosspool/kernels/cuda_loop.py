"""Python interface of ``libcrosspool_cuda.so`` (sgl-kernel-ext/cuda/): a GPU's resident loop.

One scheduler graph per lane polls for steps and launches the captured graph of each stage, layer by
layer, without the host.

    model, lane = ModelStages(kinds=(False, True, True)), LanePlaces(words, chosen)
    loop = CudaLoop([model], [lane], bucket_rows=[1, 2, 4])
    for stage, bucket, graph in captured:            # graph: torch.cuda.CUDAGraph(keep_graph=True)
        loop.add_graph(0, 0, stage, bucket, graph.raw_cuda_graph())
    loop.start()
    loop.push_step(0, GPUStepArguments(step=1, model=0, bucket=0, rows=1, wanted=1, lease=1, ...))
    while (event := loop.pop()) is None:
        loop.wait(1.0)
    with loop.quiesced():                            # nothing of the loop is on the device
        ...                                          # operations that may wait behind it
    loop.close()

The graph of a stage reads the lane's ``words``, 32 bytes on the device (``StageWords``). Their
int32 elements are: [0:2] the address of the step's inputs (int64), [2] the layer, [3] the link, [4]
the rows, [5] the steps of the lease that have ended. ``EMBED`` copies the step's inputs from there
to the lane's buffers and embeds them; ``FEED`` embeds the tokens that ``HEAD`` wrote last, one
position further; ``ATTENTION``, ``DENSE_FFN`` and ``MOE_FFN`` run the layer; ``HEAD`` writes int32
tokens to the lane's ``chosen``, wanted rows first.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
from collections.abc import Collection, Iterator, Sequence
from ctypes import byref
from dataclasses import dataclass
from pathlib import Path

import crosspool.kernels
from crosspool.kernels import cuda_loop_structs as cs
from crosspool.kernels import native
from crosspool.kernels.engine_structs import RECALL, RESUME, Command, Event
from crosspool.kernels.residency import Residency
from crosspool.transport.heartbeats import Activity

LIBRARY = "libcrosspool_cuda.so"
MAX_HELD = 8
"""Most steps of a lane at once: the one under way and those that wait behind it."""
MAX_LINKS = 8
"""Most links of a lane."""
TRACE_ROOM = 1 << 14
"""Stages that a trace keeps of each lane."""

GPUStepArguments = cs.GPUStepArguments
LaneStatus = cs.LaneStatus
LinkMemory = cs.LinkMemory
TracedStage = cs.TracedStage


class GPUStage(enum.IntEnum):
    """crosspool::gpu::GPUStage."""

    EMBED = 0
    FEED = 1
    ATTENTION = 2
    DENSE_FFN = 3
    MOE_FFN = 4
    HEAD = 5
    DISPATCH = 6
    COMBINE = 7


class LanePhase(enum.IntEnum):
    """crosspool::gpu::Phase."""

    NEW = 0
    IDLE = 1
    STAGE = 2
    RUNNING = 3
    PEERS = 4
    HOST = 5
    EVENT = 6
    NEXT = 7
    FAILED = 8


class CudaLoopError(RuntimeError):
    """The resident loop refuses, or cannot go on; the message says why."""


@dataclass(frozen=True)
class ModelStages:
    """A model as a loop knows it."""

    kinds: tuple[bool, ...]
    """Whether the FFN part of each layer is a MoE."""
    row_bytes: int = 0
    """Bytes of a dispatched row; 0 where nothing crosses."""
    links: tuple[int, ...] = ()
    """Indices of the lane's links that lead to FFN ranks of the model on other devices."""
    local: bool = True
    """Whether this device holds the FFN parts, or a share of them."""


@dataclass(frozen=True)
class LanePlaces:
    """A lane's fixed places on the device."""

    words: int
    """Address of the 32 bytes that graphs read, 32-byte aligned."""
    chosen: int
    """Address of int32 [rows of the largest bucket]: the tokens that ``HEAD`` chose."""
    links: tuple[LinkMemory, ...] = ()
    serves: bool = False
    """Whether the lane is an FFN rank's, which serves the dispatches that come through its
    links."""


def load(path: Path) -> ctypes.CDLL:
    """Loads the library at ``path``, with typed functions. Raises ImportError."""
    how = "build it again (`make env CUDA=ON`)"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in cs.SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ImportError(f"{path} cannot be loaded ({error}): {how}") from error
    if library.crosspool_abi_version() != native.ABI_VERSION:
        raise ImportError(f"{path} is not of version {native.ABI_VERSION}: {how}")
    sizes = (ctypes.c_uint64 * len(cs.MIRRORED))()
    library.crosspool_cuda_sizes(sizes, len(sizes))
    for structure, size in zip(cs.MIRRORED, sizes, strict=True):
        if ctypes.sizeof(structure) != size:
            raise ImportError(f"{path} has {size} bytes for {structure.__name__}: {how}")
    return library


def library_path() -> Path | None:
    """Path of the library; None where it was not built (no nvcc)."""
    folders = [Path(folder) for folder in crosspool.kernels.__path__]
    return next((folder / LIBRARY for folder in folders if (folder / LIBRARY).is_file()), None)


@functools.cache
def library() -> ctypes.CDLL:
    """Loads the library. Raises ImportError, which says how to build it, when it is missing or of
    another version."""
    path = library_path()
    if path is None:
        raise ImportError(
            f"CrossPool's GPU library {LIBRARY} was not built: `make env CUDA=ON`, or `pip install "
            ". --config-settings=cmake.define.CROSSPOOL_CUDA=ON`, with nvcc on PATH"
        )
    return load(path)


class CudaLoop:
    """The resident loop of the current CUDA device. The caller keeps what its descriptions point
    to. One thread at a time uses it."""

    def __init__(
        self,
        models: Sequence[ModelStages],
        lanes: Sequence[LanePlaces],
        bucket_rows: Sequence[int],
        *,
        epoch: int = 1,
        spin_s: float = 1e-3,
        wait_s: float = 30.0,
        residency: Residency | None = None,
        native: ctypes.CDLL | None = None,
    ) -> None:
        """``bucket_rows``: ascending; ``spin_s``: how long a pass polls before it launches
        the next. ``wait_s``: bound of each wait of a lane for the host, and of a stage.
        ``residency``: the device's guard, which is told when the loop is on the device.

        Raises CudaLoopError."""
        self._native = library() if native is None else native
        self._address: int | None = None
        self._residency = residency or Residency("the current device")
        self.lanes = len(lanes)
        self._serving = [index for index, lane in enumerate(lanes) if lane.serves]
        kinds = [(ctypes.c_uint8 * len(m.kinds))(*map(int, m.kinds)) for m in models]
        described = (cs.ModelDescription * len(models))()
        for into, model, row in zip(described, models, kinds, strict=True):
            into.layer_kinds = ctypes.addressof(row)
            into.layers, into.row_bytes = len(model.kinds), model.row_bytes
            into.links = sum(1 << link for link in set(model.links))
            into.local = int(model.local)
        links = [(LinkMemory * max(1, len(lane.links)))(*lane.links) for lane in lanes]
        places = (cs.LaneDescription * len(lanes))()
        for place, lane, array in zip(places, lanes, links, strict=True):
            place.words, place.chosen = lane.words, lane.chosen
            place.links, place.link_count = ctypes.addressof(array), len(lane.links)
            place.role = int(lane.serves)
        description = cs.GPULoopDescription(
            models=described,
            lanes=places,
            bucket_rows=(ctypes.c_uint32 * len(bucket_rows))(*bucket_rows),
            model_count=len(models),
            lane_count=len(lanes),
            bucket_count=len(bucket_rows),
            epoch=epoch,
            spin_ns=int(spin_s * 1e9),
            wait_ns=int(wait_s * 1e9),
        )
        address = self._native.crosspool_cuda_loop_create(byref(description))
        if address is None:
            raise self._error()
        self._address = address

    def add_graph(self, lane: int, model: int, stage: GPUStage, bucket: int, graph: int) -> None:
        """Puts a captured graph (``cudaGraph_t``, as ``CUDAGraph.raw_cuda_graph()`` gives it) into
        a lane's table. It is instantiated and uploaded here, so the loop must not run; the captured
        graph stays the caller's.

        Raises CudaLoopError, for example for a node that cannot be launched from the device."""
        self._check(
            self._native.crosspool_cuda_loop_add_graph(
                self._address, lane, model, stage, bucket, graph
            )
        )

    def start(self) -> None:
        """Launches the lanes, for the first time or after :meth:`quiesce`. Everything that
        may wait for the device must be done before (:mod:`crosspool.kernels.residency`). Raises
        CudaLoopError."""
        self._residency.enter(self)
        self._check(self._native.crosspool_cuda_loop_start(self._address))

    def probe(self, beside: int, timeout_s: float = 5.0) -> list[str]:
        """Returns which streams make no progress within ``timeout_s`` while the loop is on the
        device, for the first time: the lanes', and ``beside`` (``cudaStream_t``), in which the host
        works. None are returned where each has a connection to the device of its own.

        Raises CudaLoopError."""
        stuck = (ctypes.c_uint8 * (self.lanes + 1))()
        self._check(
            self._native.crosspool_cuda_loop_probe(
                self._address, beside, int(timeout_s * 1e9), stuck
            )
        )
        names = [*(f"lane {lane}" for lane in range(self.lanes)), "the stream beside the lanes"]
        return [name for name, is_stuck in zip(names, stuck, strict=True) if is_stuck]

    def quiesce(self, timeout_s: float = 10.0) -> None:
        """Has every lane leave the device between two steps, and waits until all have. Their steps
        go on with the next :meth:`start`. Raises CudaLoopError after ``timeout_s``."""
        self._check(self._native.crosspool_cuda_loop_quiesce(self._address, int(timeout_s * 1e9)))
        self._residency.leave(self)

    @contextlib.contextmanager
    def quiesced(self, timeout_s: float = 10.0) -> Iterator[None]:
        """Keeps the loop off the device. Raises CudaLoopError."""
        self.quiesce(timeout_s)
        try:
            yield
        finally:
            self.start()

    def push_step(self, lane: int, arguments: GPUStepArguments) -> None:
        """Queues a step. The structure is copied; what its addresses point to, device or pinned
        memory, stays as it is until the step's ``DONE``. Raises CudaLoopError."""
        status = self._native.crosspool_cuda_loop_push_step(self._address, lane, byref(arguments))
        self._check(status)
        if status == 0:
            raise CudaLoopError(f"lane {lane} has {MAX_HELD} steps already")

    def push_resume(self, lane: int, step: int) -> None:
        """Lets a lane go on after the host has looked at its logits. Raises CudaLoopError."""
        self._push(lane, Command(RESUME, lane, step, None, 0))

    def push_recall(self, lane: int, step: int) -> None:
        """Ends a step's lease, if it still has one, with the step under way, or with its first if
        none is. A step that waits on the lane ends the lease before it, too. Raises
        CudaLoopError."""
        self._push(lane, Command(RECALL, lane, step, None, 0))

    def pop(self) -> Event | None:
        """Returns the next event of any lane; None where there is none.

        Raises CudaLoopError when a lane cannot go on."""
        event = Event()
        status = self._native.crosspool_cuda_loop_pop(self._address, byref(event))
        self._check(status)
        return event if status else None

    def wait(self, timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` seconds for an event. Returns whether there is one."""
        status = self._native.crosspool_cuda_loop_wait(self._address, int(timeout_s * 1e9))
        self._check(status)
        return bool(status)

    def status(self, lane: int) -> LaneStatus:
        """Returns what the lane last wrote about itself; its ``heartbeat`` grows while it is
        resident."""
        status = LaneStatus()
        self._check(self._native.crosspool_cuda_loop_status(self._address, lane, byref(status)))
        return status

    def activity(self, stepping: Collection[int]) -> tuple[Activity, int, int]:
        """Returns what the lanes of the FFN rank and those in ``stepping``, which have steps, do,
        how often all lanes have looked for work or replies, and how many stages they have launched.
        Raises CudaLoopError."""
        statuses = [self.status(lane) for lane in range(self.lanes)]
        found = Activity.IDLE
        for lane in (*stepping, *self._serving):
            phase = statuses[lane].phase
            if phase in (LanePhase.STAGE, LanePhase.PEERS):  # STAGE: it waits for the reply to
                found = found or Activity.WAITING  # a predecessor, or for a moment
            elif phase != LanePhase.HOST and (phase != LanePhase.IDLE or lane not in self._serving):
                found = Activity.COMPUTING
        looks = sum(status.heartbeat for status in statuses)
        return found, looks, sum(status.launches for status in statuses)

    def trace_start(self) -> None:
        """Makes the lanes record their stages from now on; a lane in a step begins at its end.
        Raises CudaLoopError."""
        self._check(self._native.crosspool_cuda_loop_trace_start(self._address))

    def trace_stop(self) -> list[TracedStage]:
        """Ends the recording. Returns the latest stages, at most ``TRACE_ROOM`` of each lane, in
        the order of their ends. Times are CLOCK_MONOTONIC, in ns, as near as the host can tell from
        what it sees of the device's clock. Raises CudaLoopError."""
        room = self.lanes * TRACE_ROOM
        stages = (TracedStage * room)()
        count = self._native.crosspool_cuda_loop_trace_stop(self._address, stages, room)
        self._check(count)
        return list(stages[:count])

    @property
    def served(self) -> int:
        """Dispatches that the lanes of the FFN rank have taken."""
        return sum(self.status(lane).launches for lane in self._serving)

    def close(self, timeout_s: float = 10.0) -> None:
        """Quiesces, and frees everything; steps in flight are lost.

        Raises CudaLoopError when a lane does not leave the device (its memory must then stay, and
        the process should end), or another loop is on it."""
        if self._address is not None:
            self.quiesce(timeout_s)
            self._check(self._native.crosspool_cuda_loop_free(self._address))
            self._address = None

    def _push(self, lane: int, command: Command) -> None:
        status = self._native.crosspool_cuda_loop_push(self._address, lane, byref(command))
        self._check(status)
        if status == 0:
            raise CudaLoopError(f"the command ring of lane {lane} is full")

    def _check(self, status: int) -> None:
        if status < 0:
            raise self._error()

    def _error(self) -> CudaLoopError:
        return CudaLoopError(self._native.crosspool_cuda_error().decode())
