"""A resident loop over the fake driver whose stages note that they ran, and the other end of a link
that it has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from crosspool.kernels import cuda_loop_structs as cs
from crosspool.kernels.cuda_loop import (
    CudaLoop,
    GPUStage,
    GPUStepArguments,
    LanePlaces,
    LinkMemory,
    ModelStages,
)
from crosspool.kernels.residency import Residency
from support.fake_cuda_graphs import FakeCuda

ROW_BYTES = 8
"""Bytes of a row that crosses a link."""
STAGES = (
    GPUStage.EMBED,
    GPUStage.FEED,
    GPUStage.ATTENTION,
    GPUStage.DENSE_FFN,
    GPUStage.MOE_FFN,
    GPUStage.HEAD,
)


class FakeLink:
    """A link in host memory, at both ends of which the test may be."""

    def __init__(self, max_rows: int = 2) -> None:
        self._bytes = (ctypes.c_uint8 * 8192)()
        address = (ctypes.addressof(self._bytes) + 63) // 64 * 64
        self.memory = LinkMemory(address, 64, max_rows, ROW_BYTES)
        self.dispatched = ctypes.c_uint64.from_address(address)
        self.dispatch = (ctypes.c_uint32 * 6).from_address(address + 64)
        """Epoch (two elements), model, layer, rows, bytes of a row."""
        self.combined = ctypes.c_uint64.from_address(address + 128)
        self.combine = (ctypes.c_uint32 * 4).from_address(address + 192)

    def reply(self) -> None:
        self.combine[:] = [*self.dispatch[:2], *self.dispatch[4:]]
        self.combined.value = self.dispatched.value


class LoopBench:
    """A loop over a model of a dense and a MoE layer. Its FFN parts are behind ``link``; with
    ``serves``, the loop serves them through it."""

    def __init__(
        self,
        driver: FakeCuda,
        *,
        lanes: int = 1,
        leave_out: GPUStage | None = None,
        ticks: int = 1,
        wait_s: float = 5.0,
        link: FakeLink | None = None,
        serves: bool = False,
        residency: Residency | None = None,
    ) -> None:
        self.driver = driver
        self.ran: list[tuple[int, GPUStage, int, int]] = []
        self.words = [(cs.StageWords * 2)() for _ in range(lanes)]
        self.chosen = [(ctypes.c_int32 * 2)() for _ in range(lanes)]
        self.next_token = 100
        self.kept: list[object] = []
        self.kept.append(link)
        links = () if link is None else (link.memory,)
        remote = link is not None and not serves
        places = [
            LanePlaces(_aligned(words), ctypes.addressof(chosen), links, serves)
            for words, chosen in zip(self.words, self.chosen, strict=True)
        ]
        model = ModelStages((False, True), ROW_BYTES, (0,) if remote else (), local=not remote)
        self.loop = CudaLoop(
            [model],
            places,
            [2],
            spin_s=1e-6,
            wait_s=wait_s,
            residency=residency,
            native=driver.native,
        )
        for lane in range(lanes):
            for stage in (*STAGES, *((GPUStage.DISPATCH, GPUStage.COMBINE) if remote else ())):
                if stage != leave_out:
                    graph = driver.graph(self._body(lane, stage, places[lane]), ticks=ticks)
                    self.loop.add_graph(lane, 0, stage, 0, graph)

    def _body(self, lane: int, stage: GPUStage, places: LanePlaces) -> Callable[[], None]:
        words = cs.StageWords.from_address(places.words)

        def body() -> None:
            self.ran.append((lane, stage, words.layer, words.done))
            if stage == GPUStage.HEAD:
                for row in range(words.rows):
                    self.chosen[lane][row] = self.next_token
                    self.next_token += 1

        return body

    def step(self, number: int = 1, **fields: int) -> GPUStepArguments:
        lease = fields.get("lease", 1)
        self.tokens = (ctypes.c_int32 * (2 * lease))()
        self.kept.append(self.tokens)
        arguments = GPUStepArguments(
            step=number, rows=2, wanted=2, lease=1, tokens=ctypes.addressof(self.tokens)
        )
        for name, value in fields.items():
            setattr(arguments, name, value)
        return arguments

    def events(self, units: int = 4000) -> list[tuple[int, int, int]]:
        """Lets the driver progress; returns kind, step and earlier steps of the lease of every
        event."""
        self.driver.run(units)
        found = []
        while (event := self.loop.pop()) is not None:
            found.append((event.kind, event.step, event.first))
        return found

    def close(self) -> None:
        self.loop.close()
        assert self.driver.live == 0
        assert self.driver.violations == [], self.driver.violations


def _aligned(words: ctypes.Array[cs.StageWords]) -> int:
    return (ctypes.addressof(words) + 31) // 32 * 32
