"""Devices of a deployment in one process, under either loop, and the scheduler's side of them."""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.kvpool.layout import KVLayout
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer
from crosspool.models.registry import specs_of
from crosspool.models.spec import KVCacheDType
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.device_process import load_ranks
from crosspool.transport import links
from crosspool.transport.data_path import between_hosts
from crosspool.transport.messages import (
    Logprobs,
    Open,
    Release,
    Row,
    RowResult,
    Sampling,
    Step,
    StepResult,
)
from crosspool.weightpool.placement import place
from support.hosts import Hosts

GREEDY = Sampling(temperature=0.0)
Load = Callable[..., DeviceRanks]
CORES = sorted(os.sched_getaffinity(0))


@dataclass
class Stream:
    """A request on attention rank 0, with pages of its own."""

    model: int
    prompt: list[int]
    new_tokens: int
    sampling: Sampling = GREEDY
    logprobs: Logprobs = field(default_factory=Logprobs)
    chunk: int = 1 << 30
    bitmask: bytes | None = None
    output: list[int] = field(default_factory=list)
    results: list[RowResult] = field(default_factory=list)
    request: int = -1
    computed: int = 0
    paged: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.output) >= self.new_tokens


class Machine:
    """An attention rank on ``kv`` (and idle ones on the others it names), FFN ranks on ``weights``;
    all KV memory is mapped at the first step of a model and full of NaN before."""

    def __init__(
        self,
        models: Sequence[Path],
        *,
        loop: Literal["host", "resident"],
        kv: str | Sequence[str] = "cpu",
        weights: Sequence[str] = ("cpu",),
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        quantization: Literal["int4", "int8", "fp8"] | None = None,
        kv_cache_dtype: KVCacheDType = "auto",
        chunks_per_model: int = 2,
        load: Load = load_ranks,
        **fields: Any,
    ) -> None:
        ranks = [kv] if isinstance(kv, str) else kv
        settings: dict[str, Any] = {
            "kv_pool_bytes": len(ranks) * len(models) * chunks_per_model * (2 << 20),
            "weight_pool_bytes": 1 << 30,
            "page_size": 4,
            "packed_cache_bytes": 0,
            "loop": loop,
        } | fields
        self.deployment = Deployment(
            models={
                i: ModelConfig(
                    name=f"{path.name}-{i}",
                    path=str(path),
                    dtype=dtype,
                    quantization=quantization,
                    kv_cache_dtype=kv_cache_dtype,
                )
                for i, path in enumerate(models)
            },
            next_model=len(models),
            kv_pool_devices=tuple(map(Device, ranks)),
            weight_pool_devices=tuple(map(Device, weights)),
            **settings,
        )
        deployment = self.deployment
        self.specs = specs_of(deployment.models)
        placement = place(deployment, self.specs)
        self.fd = links.create(deployment, self.specs)
        self._load, self._placement = load, placement
        self._hosts: Hosts | None = None
        if between_hosts(deployment):
            self._hosts = Hosts(deployment, links.room_for_rows(self.specs))
        self.devices: list[DeviceRanks] = []
        for index in range(len(deployment.devices)):
            self.load(index)
        self.first = self.devices[0]
        assert self.first.attention is not None
        virtualizer: Any = self.first.attention.virtualizer
        if isinstance(virtualizer, MremapVirtualizer):
            ctypes.memset(virtualizer._parking, 0xFF, virtualizer.budget_bytes)
        self._chunks = chunks_per_model
        self._layouts = {
            number: KVLayout(spec, 4, deployment.chunk_bytes) for number, spec in self.specs.items()
        }
        self._mapped: set[int] = set()
        self.forget_memory()
        self._numbers = 0
        self.results_taken = 0
        self.steps_sent = 0

    def load(self, index: int) -> None:
        """Loads the ranks of a device, for the first time or in the place of those that were
        closed."""
        device = self.deployment.devices[index]
        peers: dict[str, Any] = {} if self._hosts is None else {"peers": self._hosts.peers(device)}
        self.devices[index : index + 1] = [
            self._load(
                self.deployment,
                device,
                self.specs,
                self._placement,
                None if self.fd is None else os.dup(self.fd),
                **peers,
            )
        ]

    def forget_memory(self) -> None:
        """Takes back all pages, for an attention rank that was loaded again."""
        self._mapped.clear()
        self._free_pages = [
            random.Random(1).sample(range(pages), pages)
            for pages in (layout.pages_in(self._chunks) for layout in self._layouts.values())
        ]

    def step(self, sequences: Sequence[Stream], lease: int = 1) -> Step:
        """The next tokens of ``sequences``, of one model, and up to ``lease - 1`` more."""
        model = sequences[0].model
        opens, rows = [], []
        for s in sequences:
            assert s.model == model
            if s.request < 0:
                self._numbers += 1
                s.request = self._numbers
                opens.append(
                    Open(
                        request=s.request,
                        prompt_len=len(s.prompt),
                        sampling=s.sampling,
                        logprobs=s.logprobs,
                    )
                )
            known = s.prompt + s.output
            end = min(len(known), s.computed + s.chunk)
            while len(s.pages) < self._layouts[model].pages_for(end + lease - 1):
                s.pages.append(self._free_pages[model].pop())
            rows.append(
                Row(
                    request=s.request,
                    start=s.computed,
                    tokens=known[s.computed : end],
                    pages=s.pages[s.paged :],
                    sample=end == len(known),
                    bitmask=s.bitmask,
                )
            )
            s.paged, s.computed = len(s.pages), end
        chunks = [] if model in self._mapped else list(range(self._chunks))
        self._mapped.add(model)
        self._numbers += 1
        return Step(
            step=self._numbers,
            model=model,
            map_chunks=chunks,
            opens=opens,
            rows=rows,
            lease=lease,
        )

    def take(self, sequences: Sequence[Stream], result: StepResult) -> None:
        self.results_taken += 1
        for s, row in zip(sequences, result.rows, strict=True):
            assert s.request == row.request
            s.results.append(row)
            if row.token >= 0:
                s.output.append(row.token)
            if result.more:
                s.computed += 1

    def submit(self, operation: Step | Release) -> None:
        self.steps_sent += isinstance(operation, Step)
        self.first.executor.submit(operation)

    def results(self, count: int, timeout: float = 60.0) -> list[StepResult]:
        """The next ``count`` results; every executor is run in turn."""
        found: list[StepResult] = []
        deadline = time.monotonic() + timeout
        wait = 0.0 if self.deployment.loop == "host" else 0.01
        while len(found) < count:
            for device in self.devices:
                found += device.executor.run(wait if device is self.first else 0.0)
            assert time.monotonic() < deadline, f"{len(found)} of {count} steps ended"
        return found

    def generate(self, sequences: Iterable[Stream], lease: int = 1) -> None:
        """Runs sequences to their ends: one step per model at a time, all models at once, with
        leases where every row samples."""
        groups: dict[int, list[Stream]] = {}
        for sequence in sequences:
            groups.setdefault(sequence.model, []).append(sequence)
        flying: dict[int, list[Stream]] = {}

        def send(model: int) -> None:
            if batch := [s for s in groups[model] if not s.done]:
                sampling = all(s.computed + s.chunk >= len(s.prompt + s.output) for s in batch)
                left = min(s.new_tokens - len(s.output) for s in batch)
                step = self.step(batch, min(lease, left) if sampling else 1)
                flying[step.step] = batch
                self.submit(step)

        for model in groups:
            send(model)
        while flying:
            for result in self.results(1):
                batch = flying[result.step]
                self.take(batch, result)
                if not result.more:
                    del flying[result.step]
                    send(batch[0].model)

    def close(self) -> None:
        for device in self.devices:
            device.close()
        if self.fd is not None:
            os.close(self.fd)
        if self._hosts is not None:
            self._hosts.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
