"""Lane events of a GPU, from either of its loops."""

from __future__ import annotations

from collections.abc import Sequence

from crosspool.kernels.cuda_loop import MAX_LINKS, CudaLoop, GPUStage
from crosspool.kernels.cuda_loop_structs import GPUStepArguments, TracedStage
from crosspool.observability.trace import LaneEvent, LaneTrace, Part
from crosspool.transport.data_path import DispatchHeader

_PARTS: dict[GPUStage, Part] = {
    GPUStage.ATTENTION: "attention",
    GPUStage.DENSE_FFN: "ffn",
    GPUStage.MOE_FFN: "ffn",
    GPUStage.HEAD: "lm_head",
}


class GPUTrace:
    """A :class:`~crosspool.observability.trace.LaneTrace` for the host-launched loop. While it is
    on, the host waits for every part, so that an event's time is the device's; lanes then do not
    overlap."""

    def __init__(self, *, attention_rank: int = 0, ffn_rank: int = 0) -> None:
        """The arguments are the ranks of this device."""
        self._attention_rank = attention_rank
        self._ffn_rank = ffn_rank
        self._trace = LaneTrace()

    @property
    def on(self) -> bool:
        return self._trace.on

    def start(self) -> None:
        self._trace.start()

    def stop(self) -> list[LaneEvent]:
        return self._trace.stop()

    def part(
        self, lane: int, step: GPUStepArguments, stage: GPUStage, layer: int, start_ns: int
    ) -> None:
        """Records a part of the attention rank's lane that has just ended on the device."""
        part = _PARTS[stage]
        self._trace.record(
            role="ffn" if part == "ffn" else "attention",
            rank=self._ffn_rank if part == "ffn" else self._attention_rank,
            attention_rank=self._attention_rank,
            lane=lane,
            step=-1 if part == "ffn" else step.step,
            model=step.model,
            layer=layer,
            part=part,
            rows=step.wanted if part == "lm_head" else step.rows,
            start_ns=start_ns,
        )

    def served(
        self, attention_rank: int, lane: int, dispatch: DispatchHeader, start_ns: int
    ) -> None:
        """Records the FFN part of another device's dispatch, which has just ended."""
        self._trace.record(
            role="ffn",
            rank=self._ffn_rank,
            attention_rank=attention_rank,
            lane=lane,
            step=-1,
            model=dispatch.model,
            layer=dispatch.layer,
            part="ffn",
            rows=dispatch.rows,
            start_ns=start_ns,
        )


class ResidentGPUTrace:
    """A :class:`~crosspool.observability.trace.LaneTrace` for the resident loop. The device records
    the parts itself, so tracing makes nothing wait. A part lasts from its launch to the pass of its
    lane's scheduler that finds it done."""

    def __init__(
        self,
        loop: CudaLoop,
        *,
        attention_rank: int,
        ffn_rank: int,
        own_lanes: int,
        sources: Sequence[tuple[int, int]],
    ) -> None:
        """``own_lanes``: lanes of the attention rank here. The loop's others serve the links from
        other devices; ``sources``: attention rank and lane at the other end of each."""
        self._loop = loop
        self._attention_rank, self._ffn_rank = attention_rank, ffn_rank
        self._own_lanes, self._sources = own_lanes, sources

    def start(self) -> None:
        self._loop.trace_start()

    def stop(self) -> list[LaneEvent]:
        """Returns events in the order of their ends. Embedding, dispatch and combine are stages
        between parts and give none."""
        stages = self._loop.trace_stop()
        return [self._event(stage) for stage in stages if GPUStage(stage.stage) in _PARTS]

    def _event(self, stage: TracedStage) -> LaneEvent:
        part = _PARTS[GPUStage(stage.stage)]
        attention_rank, lane = self._attention_rank, stage.lane
        if lane >= self._own_lanes:
            link = (lane - self._own_lanes) * MAX_LINKS + stage.link
            attention_rank, lane = self._sources[link]
        return LaneEvent(
            role="ffn" if part == "ffn" else "attention",
            rank=self._ffn_rank if part == "ffn" else self._attention_rank,
            attention_rank=attention_rank,
            lane=lane,
            step=-1 if part == "ffn" else stage.step,
            model=stage.model,
            layer=-1 if part == "lm_head" else stage.layer,
            part=part,
            rows=stage.rows,
            start_ns=stage.start_ns,
            end_ns=stage.end_ns,
        )
