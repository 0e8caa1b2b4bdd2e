"""Launchers of stages from the host: as captured graphs on the lane's stream, or by plain calls on
CPU tensors, where Triton interprets the kernels."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from crosspool.kernels.cuda_loop import GPUStage
from crosspool.ranks.gpu.ffn import StageCall
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.ranks.gpu.stages import HasStages

if TYPE_CHECKING:
    from crosspool.transport.device_links import Tail

Key = tuple[int, int, GPUStage, int]
"""Lane, model, stage, and index of the bucket."""
Refused = dict[Key, str]
"""Why a stage cannot be launched as a graph."""


class Launcher(Protocol):
    """Has stages done; those of one lane in the order in which they were asked for."""

    def write(
        self, lane: int, inputs: int, rows: int, done: int, *, layer: int = 0, link: int = 0
    ) -> None:
        """Writes the lane's words: for a step (``inputs``: address of its inputs in host memory,
        ``done``: steps of its lease that have ended), or for a dispatch that came through
        ``link``."""

    def set_layer(self, lane: int, layer: int) -> None: ...

    def launch(self, lane: int, model: int, stage: GPUStage, bucket: int) -> None: ...

    def fetch(self, lane: int, address: int, count: int) -> None:
        """Copies the first ``count`` chosen tokens to host memory."""

    def fence(self, lane: int) -> None:
        """Marks the point up to which :meth:`finished` asks."""

    def finished(self, lane: int) -> bool: ...

    def synchronize(self, lane: int) -> None:
        """Waits until everything on the lane is done."""


class EagerLauncher:
    """Calls the stages at once, on CPU tensors."""

    def __init__(
        self, lanes: Sequence[LaneBuffers], stages: Mapping[tuple[int, int, int], HasStages]
    ) -> None:
        """``stages``: by lane, model and bucket."""
        self._lanes = lanes
        self._calls: dict[Key, StageCall] = {
            (lane, model, stage, bucket): call
            for (lane, model, bucket), of_model in stages.items()
            for stage, call in of_model.calls.items()
        }

    def write(
        self, lane: int, inputs: int, rows: int, done: int, *, layer: int = 0, link: int = 0
    ) -> None:
        self._lanes[lane].words.copy_(words(inputs, rows, done, layer, link))

    def set_layer(self, lane: int, layer: int) -> None:
        self._lanes[lane].layer.fill_(layer)

    def launch(self, lane: int, model: int, stage: GPUStage, bucket: int) -> None:
        self._calls[lane, model, stage, bucket]()

    def fetch(self, lane: int, address: int, count: int) -> None:
        host_tokens(address, count).copy_(self._lanes[lane].chosen[:count])

    def fence(self, lane: int) -> None:
        pass

    def finished(self, lane: int) -> bool:
        return True

    def synchronize(self, lane: int) -> None:
        pass


class GraphLauncher:
    """Launches captured graphs, each lane's on a stream of its own."""

    def __init__(
        self,
        lanes: Sequence[LaneBuffers],
        graphs: Mapping[Key, torch.cuda.CUDAGraph],
        layers: int,
        host: HostSide,
    ) -> None:
        """``graphs`` are instantiated; ``layers``: layers of the deepest model."""
        device = lanes[0].device
        self._lanes = lanes
        self._graphs = graphs
        self._streams = [host.new_stream() for _ in lanes]
        self._events = [torch.cuda.Event() for _ in lanes]
        self._numbers = torch.arange(layers + 1, dtype=torch.int32, device=device)
        self._words = [host.full((8,), 0, torch.int32) for _ in lanes]

    def write(
        self, lane: int, inputs: int, rows: int, done: int, *, layer: int = 0, link: int = 0
    ) -> None:
        # The lane's last step or dispatch is over, between two steps of a lease too; and with it
        # the last copy out of this memory.
        self._words[lane].copy_(words(inputs, rows, done, layer, link))
        with torch.cuda.stream(self._streams[lane]):
            self._lanes[lane].words.copy_(self._words[lane], non_blocking=True)

    def set_layer(self, lane: int, layer: int) -> None:
        with torch.cuda.stream(self._streams[lane]):
            self._lanes[lane].layer.copy_(self._numbers[layer : layer + 1])

    def launch(self, lane: int, model: int, stage: GPUStage, bucket: int) -> None:
        with torch.cuda.stream(self._streams[lane]):
            self._graphs[lane, model, stage, bucket].replay()

    def fetch(self, lane: int, address: int, count: int) -> None:
        with torch.cuda.stream(self._streams[lane]):
            chosen = self._lanes[lane].chosen[:count]
            host_tokens(address, count).copy_(chosen, non_blocking=True)

    def fence(self, lane: int) -> None:
        self._events[lane].record(self._streams[lane])

    def finished(self, lane: int) -> bool:
        return bool(self._events[lane].query())

    def synchronize(self, lane: int) -> None:
        self._streams[lane].synchronize()


def words(inputs: int, rows: int, done: int, layer: int = 0, link: int = 0) -> Tensor:
    """:class:`crosspool.kernels.cuda_loop_structs.StageWords` as int32 [8]."""
    out = torch.zeros(8, dtype=torch.int32)
    out[:2].view(torch.int64)[0] = inputs
    out[2], out[3], out[4], out[5] = layer, link, rows, done
    return out


def host_tokens(address: int, count: int) -> Tensor:
    """int32 [count] of host memory."""
    return torch.frombuffer((ctypes.c_int32 * count).from_address(address), dtype=torch.int32)


def capture(
    lanes: Sequence[LaneBuffers],
    stages: Mapping[tuple[int, int, int], HasStages],
    tails: Mapping[tuple[int, int, GPUStage], Tail],
    host: HostSide,
) -> tuple[dict[Key, torch.cuda.CUDAGraph], Refused]:
    """Captures every stage by itself, after calling it once so that its kernels are compiled and
    loaded; meanwhile the lanes' words and inputs say 0 rows, so that no KV is read or written.
    Returns graphs that are not instantiated, and the stages that could not be called or captured.

    ``stages``: by lane, model and bucket; ``tails``: what ends the graphs of a stage, by lane and
    model; it must not run before."""
    elements = max(s.input_elements for s in stages.values())
    empty = host.full((max(1, elements),), 0, torch.int32)
    for lane in lanes:
        lane.words.copy_(words(empty.data_ptr(), rows=0, done=0))
    torch.cuda.synchronize()
    assert host.stream is not None
    graphs: dict[Key, torch.cuda.CUDAGraph] = {}
    refused: Refused = {}
    calls = {
        (lane, model, stage, bucket): call
        for (lane, model, bucket), of_model in stages.items()
        for stage, call in of_model.calls.items()
    }
    with host.beside():
        for key, call in calls.items():
            try:
                call()
                host.synchronize()
            except Exception as error:
                refused[key] = f"calling it: {type(error).__name__}: {error}"
        for key, call in calls.items():
            if key in refused:
                continue
            lane_index, model, stage, _ = key
            tail = tails.get((lane_index, model, stage))
            try:
                graphs[key] = _captured(call, tail, host.stream)
            except Exception as error:
                refused[key] = f"capturing it: {type(error).__name__}: {error}"
    return graphs, refused


def _captured(
    call: StageCall, tail: Tail | None, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """Captures one stage in ``stream``, which is the current one."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        call()
        if tail is not None:
            tail(stream.cuda_stream)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # CUDA says again that the capture has failed
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def instantiate(graphs: Mapping[Key, torch.cuda.CUDAGraph]) -> Refused:
    """Instantiates captured graphs for launches from the host, each for itself. Returns those that
    were refused, and goes on with the rest."""
    refused: Refused = {}
    for key, graph in graphs.items():
        try:
            graph.instantiate()
        except RuntimeError as error:
            refused[key] = f"instantiating it: {error}"
    return refused


def refusal(refused: Refused, buckets: Sequence[int]) -> str:
    """Names every refused stage, and the reason. ``buckets``: rows of each, ascending."""
    lines = [
        f"model {model}, {stage.name.replace('_', ' ').lower()}, bucket of {buckets[bucket]} rows, "
        f"lane {lane}: {reason}"
        for (lane, model, stage, bucket), reason in refused.items()
    ]
    return "\n".join((f"{len(lines)} stages cannot be launched as graphs:", *lines))
