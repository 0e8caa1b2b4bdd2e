"""A model's decode step as one CUDA graph, and its stages one by one: what loops are held against.

On CPU tensors the same calls are made without a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from crosspool.kernels.cuda_loop import GPUStage
from crosspool.models.spec import DTYPE_BYTES, DenseFFN, MoEFFN
from crosspool.ranks.gpu.inputs import HostInputs, InputLayout
from crosspool.ranks.gpu.launch import words
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.scratch import LaneBuffers, Scratch
from crosspool.ranks.gpu.stages import Stages

Call = Callable[[], object]


@dataclass(frozen=True)
class WholeStep:
    """A step as one graph. The host may change ``inputs`` between two runs."""

    run: Call
    inputs: HostInputs
    chosen: torch.Tensor
    """int32, on the device: the tokens of the last run."""
    memory: torch.Tensor
    """Holds ``inputs``."""


class _LayerByLayer(LaneBuffers):
    """A lane whose layer is fixed where a stage is captured: no kernel writes it."""

    def __init__(self, device: torch.device, bucket: int, arena_bytes: int, layers: int) -> None:
        super().__init__(device, bucket, arena_bytes)
        # Aligned as the word of a real lane is, so that the same compiled kernels are measured.
        self._numbers = torch.zeros(layers, 4, dtype=torch.int32, device=device)
        self._numbers[:, 2] = torch.arange(layers)
        self.memory: torch.Tensor | None = None
        """The step's inputs, which the device reads."""
        self.at = 0

    @property
    def layer(self) -> torch.Tensor:
        return self._numbers[self.at, 2:3]


@contextlib.contextmanager
def whole_model(
    model: GPUModel, batch: int, context: int, device: torch.device
) -> Iterator[WholeStep]:
    """Embedding to sampling of ``batch`` rows, each at position ``context``."""
    lane, stages, host = _prepared(model, batch, context, device)

    def step() -> None:
        stages.embed()
        _layers(lane, stages)
        stages.head()

    assert lane.memory is not None
    yield WholeStep(_captured(step, device), host, lane.chosen, lane.memory)


@contextlib.contextmanager
def stage_calls(
    model: GPUModel, batch: int, context: int, device: torch.device
) -> Iterator[list[tuple[str, Call, int]]]:
    """Every stage by name, and the bytes that it must read at least: weights and KV. A call takes
    the next layer of its kind, so that no weight is found in a cache."""
    lane, stages, _ = _prepared(model, batch, context, device)
    stages.embed()
    _layers(lane, stages)  # so that every buffer holds what it holds in a step
    spec, kinds = model.spec, model.kinds
    size = DTYPE_BYTES[spec.dtype]
    kv = batch * (context + 1) * spec.kv_width * size
    attention = sum(t.nbytes for t in model.attention.layers[0].values())
    found: list[tuple[str, Call, int]] = [
        (
            "stage attention",
            _rotating(lane, stages.attention, list(range(spec.layers)), device),
            attention + kv,
        )
    ]
    for moe in sorted(set(kinds)):
        stage = GPUStage.MOE_FFN if moe else GPUStage.DENSE_FFN
        own = [layer for layer, kind in enumerate(kinds) if kind == moe]
        name = "stage MoE FFN" if moe else "stage dense FFN"
        call = _rotating(lane, stages.calls[stage], own, device)
        found.append((name, call, _ffn_bytes(stages, own[0], size)))
    head = spec.vocab * spec.hidden * size
    found.append(("stage head", _captured(stages.head, device), head))
    yield found


def _prepared(
    model: GPUModel, batch: int, context: int, device: torch.device
) -> tuple[_LayerByLayer, Stages, HostInputs]:
    layout = InputLayout(batch, batch, model.pages_of_sequence)
    arena = Scratch.bytes(model, layout)
    lane = _LayerByLayer(device, batch, arena, model.spec.layers)
    stages = Stages(model, layout, lane)
    memory = torch.zeros(layout.elements, dtype=torch.int32, pin_memory=device.type == "cuda")
    host, page_size = HostInputs(layout, memory), model.kv.shape[2]
    pages = -(-(context + 1) // page_size)
    for row in range(batch):
        host["tokens"][row] = 7 + row
        host["positions"][row] = context
        host["row_sequences"][row] = host["wanted_rows"][row] = row
        host.page_table[row, :pages] = range(row * pages, (row + 1) * pages)
    host.close(batch, pages, batch)
    lane.words.copy_(words(memory.data_ptr(), batch, 0))
    lane.memory = memory
    return lane, stages, host


def _layers(lane: _LayerByLayer, stages: Stages) -> None:
    calls = stages.calls
    for layer, moe in enumerate(stages.model.kinds):
        lane.at = layer
        stages.attention()
        calls[GPUStage.MOE_FFN if moe else GPUStage.DENSE_FFN]()


def _captured(call: Call, device: torch.device) -> Call:
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _rotating(lane: _LayerByLayer, call: Call, layers: list[int], device: torch.device) -> Call:
    """A stage, of another layer with each call."""

    def of(layer: int) -> Call:
        def run() -> None:
            lane.at = layer
            call()

        return _captured(run, device)

    calls, turn = [of(layer) for layer in layers], 0

    def next_layer() -> None:
        nonlocal turn
        calls[turn % len(calls)]()
        turn += 1

    return next_layer


def _ffn_bytes(stages: Stages, layer: int, size: int) -> int:
    """Bytes of the experts that the last batch chose, of the shared expert and of the router."""
    spec = stages.model.spec
    ffn = spec.ffn[layer]
    if isinstance(ffn, DenseFFN):
        return 3 * ffn.intermediate * spec.hidden * size
    assert isinstance(ffn, MoEFFN)
    chosen = len(stages.scratch.experts.unique())
    columns = chosen * ffn.intermediate + ffn.shared_intermediate
    return (3 * columns + ffn.experts) * spec.hidden * size
