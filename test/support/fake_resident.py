"""The resident loop over stages that Triton's interpreter runs: native code, as on a GPU, decides
which stage comes next; the driver behind it is the fake one of support/fake_cuda_graphs.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosspool.kernels.cuda_loop import CudaLoop, GPUStage, ModelStages
from crosspool.kernels.residency import Residency
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.lanes import loop_places
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.ranks.gpu.stages import HasStages
from crosspool.transport.device_links import Tail
from support.fake_cuda_graphs import FakeCuda, build

_UNITS = 64


class FakeResident:
    """The loops of all devices. Waiting for one of them drives them all."""

    def __init__(self, folder: Path, library: Path | None = None) -> None:
        """``library``: one that :func:`build` has made, in place of a new one in ``folder``."""
        self.cuda = FakeCuda(library or build(folder))
        self.failed: list[BaseException] = []
        self.loops: list[_Driven] = []
        """Not closed."""
        self._paused: list[_Driven] = []

    def join_loop(
        self,
        models: Sequence[ModelStages],
        lanes: Sequence[LaneBuffers],
        stages: Mapping[tuple[int, int, int], HasStages],
        buckets: Sequence[int],
        *,
        host: HostSide,
        resident: bool,
        watch: object,
        exchange: object,
        epoch: int,
        tails: Mapping[tuple[int, int, GPUStage], Tail],
    ) -> CudaLoop:
        """Takes the place of :func:`crosspool.ranks.gpu.lanes.join_loop`."""
        assert exchange is None
        # All devices are one for the fake driver. Loops that run leave it until this one starts.
        self.pause()
        places, residency = loop_places(lanes), host.residency
        loop = _Driven(self, models, places, buckets, epoch=epoch, residency=residency)
        for (lane, model, bucket), of_model in stages.items():
            for stage, call in of_model.calls.items():
                tail = tails.get((lane, model, stage))
                graph = self.cuda.graph(self._kept(call, tail))
                loop.add_graph(lane, model, stage, bucket, graph)
        return loop

    def pause(self, loops: Sequence[_Driven] | None = None) -> None:
        """Has loops, all of them unless given, leave the device until another one starts."""
        chosen = self.loops if loops is None else loops
        running = [loop for loop in chosen if loop.residency.resident]
        for loop in running:
            loop.quiesce()
        self._paused += running

    def resume(self) -> None:
        """Starts the loops again that have left the device for another one and are not closed."""
        while self._paused:
            loop = self._paused.pop()
            if loop in self.loops:
                loop.start()

    def _kept(self, call: Callable[[], None], tail: Tail | None) -> Callable[[], None]:
        """An exception cannot pass through native code."""

        def body() -> None:
            try:
                call()
                if tail is not None:
                    tail(0)
            except BaseException as error:
                self.failed.append(error)

        return body


class _Driven(CudaLoop):
    def __init__(self, fake: FakeResident, *arguments: Any, residency: Residency, **named: Any):
        native, self.residency = fake.cuda.native, residency
        super().__init__(*arguments, spin_s=1e-6, native=native, residency=residency, **named)
        self._fake = fake
        fake.loops.append(self)

    def start(self) -> None:
        super().start()
        self._fake.resume()

    def wait(self, timeout_s: float) -> bool:
        self._fake.cuda.run(_UNITS)
        if self._fake.failed:
            raise self._fake.failed[0]
        return super().wait(0.0)

    def close(self, timeout_s: float = 10.0) -> None:
        # All loops are on the one device of the fake driver, where freeing memory waits for all.
        for loop in self._fake.loops:
            loop.quiesce(timeout_s)
        self._fake.loops = [loop for loop in self._fake.loops if loop is not self]
        super().close(timeout_s)
