"""Lane events: which rank worked on which part of which layer, and when.

Every device process keeps a ring of them while tracing is on. Times are CLOCK_MONOTONIC, so events
of all processes of a host share one time axis; :func:`to_chrome` makes a file that
``chrome://tracing`` and Perfetto show.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from time import monotonic_ns
from typing import Any, Literal

import msgspec

CAPACITY = 1 << 16
"""Events that a device process keeps; older ones are dropped."""


Part = Literal["attention", "ffn", "lm_head"]


class LaneEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One part that one rank computed for one lane."""

    role: Literal["attention", "ffn"]
    rank: int
    attention_rank: int
    """The attention rank whose lane it is."""
    lane: int
    step: int
    """The attention rank's step; -1 in an FFN rank's events, which know only the layer."""
    model: int
    layer: int
    """The layer; -1 for the LM head."""
    part: Part
    rows: int
    start_ns: int
    end_ns: int


class LaneTrace:
    """A ring of events. Recording code reads ``on`` first, which is all that tracing costs while it
    is off.

    >>> trace = LaneTrace()
    >>> trace.start()
    >>> start = trace.now()
    >>> trace.record(role="ffn", rank=0, attention_rank=0, lane=1, step=-1, model=0, layer=3,
    ...              part="ffn", rows=8, start_ns=start)
    >>> [event.layer for event in trace.stop()]
    [3]
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.on = False
        self._events: deque[LaneEvent] = deque(maxlen=capacity)

    def start(self) -> None:
        """Forgets earlier events and records from now on."""
        self._events.clear()
        self.on = True

    def stop(self) -> list[LaneEvent]:
        """Ends recording and hands over the events, oldest first."""
        self.on = False
        events = list(self._events)
        self._events.clear()
        return events

    def now(self) -> int:
        """Returns the start time of a part in ns, or 0 while tracing is off."""
        return monotonic_ns() if self.on else 0

    def record(
        self,
        *,
        role: Literal["attention", "ffn"],
        rank: int,
        attention_rank: int,
        lane: int,
        step: int,
        model: int,
        layer: int,
        part: Part,
        rows: int,
        start_ns: int,
    ) -> None:
        """Records a part that ends now, unless it began before :meth:`start`."""
        if not self.on or start_ns == 0:
            return
        self._events.append(
            LaneEvent(
                role=role,
                rank=rank,
                attention_rank=attention_rank,
                lane=lane,
                step=step,
                model=model,
                layer=layer,
                part=part,
                rows=rows,
                start_ns=start_ns,
                end_ns=monotonic_ns(),
            )
        )


def to_chrome(events: Iterable[LaneEvent], models: Mapping[int, str]) -> dict[str, Any]:
    """Returns a JSON object in Chrome's trace format: a process per rank, a thread per lane.

    ``models``: the deployment's model names, by number; a model that has gone since has none."""
    rows: list[dict[str, Any]] = []
    processes: dict[tuple[str, int], int] = {}
    threads: set[tuple[int, int]] = set()
    for event in sorted(events, key=lambda e: e.start_ns):
        pid = processes.setdefault((event.role, event.rank), len(processes))
        tid = event.attention_rank << 8 | event.lane
        if (pid, tid) not in threads:
            threads.add((pid, tid))
            name = f"lane {event.lane} of attention rank {event.attention_rank}"
            rows.append(_meta("thread_name", pid, tid, name))
        what = "LM head" if event.part == "lm_head" else f"{event.part} {event.layer}"
        rows.append(
            {
                "ph": "X",
                "name": f"{models.get(event.model)}: {what}",
                "cat": event.part,
                "pid": pid,
                "tid": tid,
                "ts": event.start_ns / 1e3,
                "dur": (event.end_ns - event.start_ns) / 1e3,
                "args": {"step": event.step, "layer": event.layer, "rows": event.rows},
            }
        )
    for (role, rank), pid in processes.items():
        rows.append(_meta("process_name", pid, 0, f"{role} rank {rank}"))
    return {"traceEvents": rows, "displayTimeUnit": "ns"}


def _meta(name: str, pid: int, tid: int, value: str) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": value}}
