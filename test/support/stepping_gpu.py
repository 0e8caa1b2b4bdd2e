"""One GPU whose resident loop runs stages that touch the KV pages of their rows and compute
nothing, over the fake drivers of graphs and of memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from crosspool.kernels.cuda_loop import CudaLoop, GPUStage, ModelStages
from crosspool.kernels.cuda_loop_structs import GPUStepArguments
from crosspool.kernels.engine_structs import DONE, Event
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.ranks.gpu.host_side import HostSide, start
from crosspool.ranks.gpu.scratch import LaneBuffers
from support.fake_cuda_memory import FakeCuda
from support.fake_resident import FakeResident
from support.one_gpu import BUCKETS, LAYERS, PAGE_SIZE, PAGES, OneGPU

CHUNK = 4096
WIDTH = 256
CHUNKS_OF_PAGE = LAYERS * PAGE_SIZE * WIDTH * 4 // CHUNK
MODELS, LANES = 2, 2


class SteppingGPU(OneGPU):
    """Two models, each with PAGES pages of CHUNKS_OF_PAGE chunks; a page's chunks hold nothing
    else."""

    def __init__(self, fake: FakeResident, next_token: Callable[[], int]) -> None:
        self._fake, self._next_token = fake, next_token
        self.driver = FakeCuda(MODELS * PAGES * CHUNKS_OF_PAGE * CHUNK, granularity=CHUNK)
        self.pool = CudaVirtualizer(
            self.driver,
            self.driver.total,
            CHUNK,
            dict.fromkeys(range(MODELS), PAGES * CHUNKS_OF_PAGE * CHUNK),
        )
        shape = (PAGES, LAYERS, PAGE_SIZE, WIDTH)
        self.kv = [self.pool.tensor(model, shape, torch.float32) for model in range(MODELS)]
        self.faults: list[str] = []
        """Accesses of a stage to memory that was not mapped."""
        self._under_way: dict[int, list[tuple[int, int]]] = {}
        """Pages of each step that was pushed and of whose end the loop has not told: address and
        bytes."""
        self._places = [LaneBuffers(torch.device("cpu"), BUCKETS[-1], 16) for _ in range(LANES)]
        self.driver.running = lambda: [page for of in self._under_way.values() for page in of]
        super().__init__(self._join(), LANES, virtualizer=self.pool, kv=self.kv)

    def close(self) -> None:
        self.executor.close()
        self.pool.close()

    def _join(self) -> CudaLoop:
        stages: Any = {
            (lane, model, bucket): SimpleNamespace(calls=self._calls(lane, model, bucket))
            for lane in range(LANES)
            for model in range(MODELS)
            for bucket in range(len(BUCKETS))
        }
        host = HostSide(torch.device("cpu"))
        loop = self._fake.join_loop(
            [ModelStages((False,) * LAYERS, 4)] * MODELS,
            self._places,
            stages,
            BUCKETS,
            host=host,
            resident=True,
            watch=None,
            exchange=None,
            epoch=1,
            tails={},
        )
        push, pop = loop.push_step, loop.pop

        def push_step(lane: int, arguments: GPUStepArguments) -> None:
            assert arguments.step not in self._under_way
            pages = self._pages(lane, arguments.bucket)
            held = [self.kv[arguments.model][page] for page in pages]
            self._under_way[arguments.step] = [(page.data_ptr(), page.nbytes) for page in held]
            push(lane, arguments)

        def popped() -> Event | None:
            event = pop()
            if event is not None and event.kind == DONE:
                del self._under_way[event.step]
            return event

        loop.push_step, loop.pop = push_step, popped  # type: ignore[method-assign]
        start(loop, host)
        return loop

    def _pages(self, lane: int, bucket: int) -> set[int]:
        inputs = self.inputs(lane, bucket)
        lines, pages = self.memory[lane].inputs[:2].tolist()
        return set(inputs.page_table[:lines, :pages].flatten().tolist())

    def _calls(self, lane: int, model: int, bucket: int) -> dict[GPUStage, Callable[[], None]]:
        place = self._places[lane]

        def attention() -> None:
            inputs, layer = self.inputs(lane, bucket), int(place.layer)
            for row in range(int(place.count)):
                position = int(inputs["positions"][row]) + int(place.words[5])
                line = inputs.page_table[inputs["row_sequences"][row]]
                for at in range(position + 1):
                    slot = self.kv[model][int(line[at // PAGE_SIZE]), layer, at % PAGE_SIZE]
                    if not self.driver.knows_pointer(slot.data_ptr()):
                        self.faults.append(f"lane {lane}, model {model}: touched unmapped memory")
                        return
                    slot += 1.0

        def head() -> None:
            for row in range(int(self.memory[lane].inputs[2])):
                place.chosen[row] = self._next_token()

        def nothing() -> None:
            pass

        return {
            GPUStage.EMBED: nothing,
            GPUStage.FEED: nothing,
            GPUStage.ATTENTION: attention,
            GPUStage.DENSE_FFN: nothing,
            GPUStage.HEAD: head,
        }
