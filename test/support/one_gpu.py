"""Both ranks of one GPU as far as the host sees them: steps, a loop, tokens, no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from crosspool.models.spec import DenseFFN, GQASpec, ModelSpec, RopeSpec
from crosspool.ranks.gpu.executor import GPUExecutor
from crosspool.ranks.gpu.flight import GPURank
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.inputs import HostInputs, HostMemory, InputLayout
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.heartbeats import Heartbeat
from crosspool.transport.messages import Logprobs, Open, Row, Sampling, Step

VOCAB, LAYERS, PAGE_SIZE, PAGES, SEQUENCES, LEASE = 32, 3, 4, 16, 4, 5
BUCKETS = [1, 2, 4, 8]


def spec(layers: int = LAYERS) -> ModelSpec:
    return ModelSpec(
        family="none",
        hidden=VOCAB,
        vocab=VOCAB,
        context=PAGES * PAGE_SIZE,
        dtype="float32",
        norm_eps=1e-6,
        tied_embeddings=True,
        attention=GQASpec(
            q_heads=1, kv_heads=1, head_dim=1, scale=1.0, rope=RopeSpec(dim=1, interleaved=False)
        ),
        ffn=(DenseFFN(intermediate=1),) * layers,
        eos_token_ids=(0,),
    )


class Chunks:
    """A virtualizer that keeps a log."""

    free_bytes = 0

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def map(self, model: int, chunks: Sequence[int]) -> None:
        self.log.append(("map", model, list(chunks)))

    def unmap(self, model: int, chunks: Sequence[int]) -> None:
        self.log.append(("unmap", model, list(chunks)))


class OneGPU:
    """An executor over ``loop``, two models, and no weights."""

    def __init__(
        self,
        loop: Any,
        lanes: int = 2,
        *,
        virtualizer: Any = None,
        kv: Sequence[torch.Tensor] = (),
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """``virtualizer``: instead of one that keeps a log; ``kv``: its caches of the models."""
        self.log: list[Any] = []
        layouts = [InputLayout(rows, min(rows, SEQUENCES), PAGES) for rows in BUCKETS]
        self.layouts = layouts
        host = HostSide(torch.device("cpu"))
        self.memory = [
            HostMemory(max(x.elements for x in layouts), SEQUENCES, LEASE, host)
            for _ in range(lanes)
        ]
        stages: Any = {
            (lane, model, bucket): SimpleNamespace(layout=layout)
            for lane in range(lanes)
            for model in range(2)
            for bucket, layout in enumerate(layouts)
        }
        parts: Any = [SimpleNamespace(positions=PAGES * PAGE_SIZE)] * 2
        caches = dict(enumerate(kv or [torch.empty(PAGES, LAYERS, PAGE_SIZE, 1)] * 2))
        chunks: Any = virtualizer or Chunks(self.log)
        self.counters = [LinkCounters() for _ in range(lanes)]
        self.executor = GPUExecutor(
            GPURank(0, {0: spec(), 1: spec()}, dict(enumerate(parts)), chunks, caches),
            loop,
            buckets=BUCKETS,
            stages=stages,
            memory=self.memory,
            counters=[[[own]] * 2 for own in self.counters],
            heartbeat=heartbeat,
        )

    def inputs(self, lane: int, bucket: int) -> HostInputs:
        return HostInputs(self.layouts[bucket], self.memory[lane].inputs)


def step(
    number: int,
    model: int = 0,
    tokens: Sequence[int] = (3,),
    *,
    lease: int = 1,
    sampling: Sampling | None = None,
    logprobs: Logprobs | None = None,
    bitmask: bytes | None = None,
    sample: bool = True,
) -> Step:
    """A request's whole prompt, of which a token is sampled."""
    return Step(
        step=number,
        model=model,
        map_chunks=[number],
        opens=[
            Open(
                request=number,
                prompt_len=len(tokens),
                sampling=sampling or Sampling(temperature=0.0),
                logprobs=logprobs or Logprobs(),
            )
        ],
        rows=[
            Row(
                request=number,
                start=0,
                tokens=list(tokens),
                pages=[number % PAGES, 1],
                sample=sample,
                bitmask=bitmask,
            )
        ],
        lease=lease,
    )
