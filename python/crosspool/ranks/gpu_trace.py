"""Lane events of a GPU: recorded part by part where the host launches them."""

from __future__ import annotations

import logging

from crosspool.kernels.cuda_loop import Stage
from crosspool.kernels.cuda_loop_structs import StepArguments
from crosspool.observability.trace import LaneEvent, LaneTrace, Part
from crosspool.ranks.gpu_loop import AnswerEnd
from crosspool.transport.data_path import DispatchHeader

log = logging.getLogger(__name__)

_PARTS: dict[Stage, Part] = {
    Stage.ATTENTION: "attention",
    Stage.DENSE_FFN: "ffn",
    Stage.MOE_FFN: "ffn",
    Stage.HEAD: "lm_head",
}


class GPUTrace:
    """As :class:`~crosspool.observability.trace.LaneTrace`. While it is on, the host waits for
    every part, so that an event's time is the device's; lanes then do not overlap. A resident loop
    does not tell of its parts."""

    def __init__(self, *, resident: bool, attention_rank: int = 0, ffn_rank: int = 0) -> None:
        """The ranks of this device."""
        self._resident = resident
        self._attention_rank = attention_rank
        self._ffn_rank = ffn_rank
        self._trace = LaneTrace()

    @property
    def on(self) -> bool:
        return self._trace.on

    def start(self) -> None:
        if self._resident:
            log.warning("the resident loop of a GPU records no lane events: use --loop host")
        self._trace.start()

    def stop(self) -> list[LaneEvent]:
        return self._trace.stop()

    def part(self, lane: int, step: StepArguments, stage: Stage, layer: int, start_ns: int) -> None:
        """A part of the attention rank's lane that has just ended on the device."""
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

    def served(self, link: AnswerEnd, dispatch: DispatchHeader, start_ns: int) -> None:
        """The FFN part of another device's dispatch that has just ended."""
        self._trace.record(
            role="ffn",
            rank=self._ffn_rank,
            attention_rank=link.attention_rank,
            lane=link.lane,
            step=-1,
            model=dispatch.model,
            layer=dispatch.layer,
            part="ffn",
            rows=dispatch.rows,
            start_ns=start_ns,
        )
