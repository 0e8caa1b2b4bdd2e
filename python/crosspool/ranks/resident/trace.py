"""The lane events of a resident loop, out of its native ring."""

from __future__ import annotations

from typing import Literal

from crosspool.kernels.engine import Loop
from crosspool.observability.trace import CAPACITY, LaneEvent, Part

_PARTS: tuple[Part, ...] = ("attention", "ffn", "lm_head")
"""Parts in the order of ``crosspool::TracedPart``."""


class ResidentTrace:
    """The trace of a resident loop: :class:`~crosspool.observability.trace.LaneTrace`'s start and
    stop, while native code records."""

    def __init__(self, loop: Loop, attention_rank: int, ffn_rank: int) -> None:
        self._loop = loop
        self._attention_rank = attention_rank
        self._ffn_rank = ffn_rank

    def start(self) -> None:
        """Forgets earlier events and records from now on."""
        self._loop.trace_start()

    def stop(self) -> list[LaneEvent]:
        """Ends recording and hands over the events, oldest first."""
        events = []
        for native in self._loop.trace_stop(CAPACITY):
            part = _PARTS[native.part]
            role: Literal["attention", "ffn"] = "ffn" if part == "ffn" else "attention"
            events.append(
                LaneEvent(
                    role=role,
                    rank=self._ffn_rank if role == "ffn" else self._attention_rank,
                    attention_rank=native.attention_rank,
                    lane=native.lane,
                    step=native.step,
                    model=native.model,
                    layer=native.layer,
                    part=part,
                    rows=native.rows,
                    start_ns=native.start_ns,
                    end_ns=native.end_ns,
                )
            )
        return events
