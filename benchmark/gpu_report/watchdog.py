"""Calls that may wait behind a resident loop, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from crosspool.kernels.cuda_loop import CudaLoop

from benchmark.gpu_report.notes import Gravity, Notes

_PATIENCE_S = 3.0
_AFTER_S = 10.0
"""Seconds in which a call returns once the loop has left the device."""


@dataclass
class _Call:
    us: float | None = None
    error: Exception | None = None


def beside(notes: Notes, loop: CudaLoop, name: str, call: Callable[[], object]) -> bool:
    """Makes a call beside a resident loop. One that does not return in three seconds is let go by
    quiescing the loop, which then goes on; that it waited is a finding. Returns whether it
    returned by itself, without an error.

    Raises TimeoutError for a call that does not return then either."""
    made = _Call()

    def body() -> None:
        began = time.perf_counter_ns()
        try:
            call()
        except Exception as error:
            made.error = error
        made.us = (time.perf_counter_ns() - began) / 1e3

    notes.at(f"{name} beside the loop")
    caller = threading.Thread(target=body, daemon=True)
    caller.start()
    caller.join(_PATIENCE_S)
    waited = caller.is_alive()
    if waited:
        loop.quiesce()
        caller.join(_AFTER_S)
        if caller.is_alive():
            raise TimeoutError(f"{name} does not return even with the loop off the device")
        loop.start()
        notes.finding(
            Gravity.WAITS, f"{name} waits behind a resident loop until it leaves the device"
        )
    if made.error is not None:
        what = f"{name} beside a resident loop: {type(made.error).__name__}: {made.error}"
        notes.finding(Gravity.REFUSED, what)
    notes.fact(name, "waited" if waited else "returned", us=round(made.us or 0.0, 1))
    return not waited and made.error is None
