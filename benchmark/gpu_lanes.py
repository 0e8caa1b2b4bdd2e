"""Lanes of one GPU driven by themselves: steps of rows with pages, no scheduler and no messages.

Needs torch, Triton and, for the resident loop, the native library; on CPU tensors, with Triton's
interpreter, the same steps are called one by one.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from crosspool.kernels.cuda_loop_structs import GPUStepArguments
from crosspool.kernels.engine_structs import DONE, TOKENS
from crosspool.models.spec import ModelSpec
from crosspool.ranks.gpu.host_side import HostSide, start
from crosspool.ranks.gpu.inputs import HostInputs, HostMemory
from crosspool.ranks.gpu.lanes import join_loop, make_stages, model_stages
from crosspool.ranks.gpu.links import Crossing
from crosspool.ranks.gpu.loop import DeviceLoop
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.ranks.weights import TORCH_DTYPES
from crosspool.weightpool.placement import FFNShard

Join = Callable[..., DeviceLoop]
"""Makes the loop over lanes, as :func:`crosspool.ranks.gpu.lanes.join_loop` does."""
_PATIENCE = 60.0
"""Seconds that a step may take."""


@dataclass(frozen=True)
class Draw:
    """How a token is drawn."""

    temperature: float
    seed: int
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Row:
    """A sequence's next tokens, of which the last one gets a successor."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    """All of its page table."""
    draw: Draw | None = None
    """None: the successor is greedy."""
    stops: Sequence[int] = ()
    """Tokens that end a lease."""


class Lanes:
    """Lanes over models on one device.

    >>> with Lanes([model], lanes=2, buckets=[1, 2, 4], device=gpu, resident=True) as lanes:
    ...     lanes.push(0, 0, [Row([5], 0, [3])])
    ...     lane, tokens = lanes.pop()  # [1 step, 1 row]
    """

    def __init__(
        self,
        models: Sequence[GPUModel],
        *,
        lanes: int,
        buckets: Sequence[int],
        device: torch.device,
        resident: bool,
        lease: int = 1,
        join: Join = join_loop,
    ) -> None:
        """``join``: makes the loop, as :func:`crosspool.ranks.gpu.lanes.join_loop` does."""
        self.models = models
        self.device = device
        self._buckets = buckets
        sequences = buckets[-1]
        self.places, self.stages = make_stages(models, buckets, lanes, sequences, device)
        elements = max(stages.layout.elements for stages in self.stages.values())
        self.host = HostSide(device)
        self.memory = [HostMemory(elements, sequences, lease, self.host) for _ in range(lanes)]
        """Memory that each lane shares with the host."""
        known = [model_stages(model.spec, Crossing()) for model in models]
        self.loop = join(
            known, self.places, self.stages, buckets, host=self.host, resident=resident
        )
        start(self.loop, self.host)
        self._flying: dict[int, GPUStepArguments] = {}
        self._steps = 0

    def push(
        self,
        lane: int,
        model: int,
        rows: Sequence[Row],
        lease: int = 1,
        lines: Sequence[int] | None = None,
    ) -> None:
        """Sends a step to a lane that is free; ``lease``: steps, for rows of one token; ``lines``:
        the sequences' lines of the page table, in order unless given."""
        assert lane not in self._flying
        memory, count = self.memory[lane], sum(len(row.tokens) for row in rows)
        bucket = bisect.bisect_left(self._buckets, count)
        layout = self.stages[lane, model, bucket].layout
        host = HostInputs(layout, memory.inputs)
        first = 0
        host["temperature"].fill(0.0)
        host["wanted_rows"].fill(0)  # those past the wanted ones are gathered, too
        lines = lines or range(len(rows))
        for i, row in enumerate(rows):
            end = first + len(row.tokens)
            host["tokens"][first:end] = row.tokens
            host["positions"][first:end] = np.arange(row.start, row.start + len(row.tokens))
            host["row_sequences"][first:end] = lines[i]
            host["wanted_rows"][i] = end - 1
            host.page_table[lines[i], : len(row.pages)] = row.pages
            if (draw := row.draw) is not None:
                host["temperature"][i], host["seed"][i] = draw.temperature, draw.seed
                host["top_k"][i], host["top_p"][i] = draw.top_k, draw.top_p
                host["min_p"][i] = draw.min_p
                host["position"][i] = row.start + len(row.tokens)
            first = end
        stops = [token for row in rows for token in row.stops]
        memory.stops.numpy()[: len(stops)] = stops
        memory.stop_ends.numpy()[: len(rows)] = np.cumsum([len(row.stops) for row in rows])
        host.close(len(rows), max(len(row.pages) for row in rows), len(rows))
        memory.tokens.fill_(-1)
        self._steps += 1
        arguments = GPUStepArguments(
            step=self._steps,
            model=model,
            bucket=bucket,
            rows=count,
            wanted=len(rows),
            lease=lease,
            inputs=memory.inputs.data_ptr(),
            tokens=memory.tokens.data_ptr(),
            stops=memory.stops.data_ptr() if stops else 0,
            stop_ends=memory.stop_ends.data_ptr() if stops else 0,
        )
        self._flying[lane] = arguments
        self.loop.push_step(lane, arguments)

    def pop(self, on_token: Callable[[int], None] | None = None) -> tuple[int, np.ndarray]:
        """The lane whose step, with all of its lease, ends next, and its tokens [steps, rows];
        ``on_token`` is called with the lane of every step that ends."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            event = self.loop.pop()
            if event is None:
                self.loop.wait(0.01)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no step ended in {_PATIENCE:.0f} s")
                continue
            if event.kind not in (DONE, TOKENS):
                raise RuntimeError(f"an event of kind {event.kind}")
            if on_token is not None:
                on_token(event.lane)
            if event.kind == DONE:
                arguments = self._flying.pop(event.lane)
                tokens = self.memory[event.lane].tokens.numpy()
                size = (event.first + 1) * arguments.wanted
                return event.lane, tokens[:size].reshape(-1, arguments.wanted).copy()

    def close(self) -> None:
        self.loop.close()
        self.host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def random_model(
    spec: ModelSpec,
    device: torch.device,
    *,
    pages: int,
    page_size: int = 16,
    seed: int = 0,
    kv: torch.Tensor | None = None,
) -> GPUModel:
    """A model of ``spec``'s shapes whose weights keep activations at their size. ``kv``: instead
    of a cache of its own, which holds random values."""
    generator = torch.Generator(device).manual_seed(seed)
    positions = min(spec.context, pages * page_size)
    attention = GPUAttention(spec, None, device, positions, lambda _: None)
    shard = FFNShard(rank=0, ranks=1, parallel="tp")
    ffn = GPUFFN(spec, None, shard, device, lambda _: None)
    for name, tensor in attention.globals.items():
        _fill(tensor, name, generator)
    for layer in attention.layers:
        for name, tensor in layer.items():
            _fill(tensor, name, generator)
    for block in ffn.layers:
        for pair in (block.experts, block.shared):
            for tensor in pair or ():
                _fill(tensor, "mlp", generator)
        if block.router is not None:
            _fill(block.router, "router", generator)
        if block.bias is not None:
            block.bias.normal_(0.0, 0.01, generator=generator)
    if kv is None:
        shape = (pages, spec.layers, page_size, spec.kv_width)
        kv = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
        for page in kv:
            page.normal_(0.0, 1.0, generator=generator)
    return GPUModel(spec, attention, ffn, kv)


def _fill(tensor: torch.Tensor, name: str, generator: torch.Generator) -> None:
    if name.endswith("norm"):
        tensor.uniform_(0.8, 1.2, generator=generator)
        return
    scale = 1.0 if name == "embed" else tensor.shape[-1] ** -0.5
    for part in tensor if tensor.dim() == 3 else (tensor,):
        part.normal_(0.0, scale, generator=generator)
