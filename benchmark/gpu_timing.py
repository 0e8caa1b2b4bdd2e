"""Times on a GPU, and the bandwidth of its memory that they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 16 << 20}


def device_times(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each call: on a GPU by events on the current stream, after three calls that are
    not counted; on a CPU by its clock."""
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times
    for _ in range(3):
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    size = _COPY_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = device_times(lambda: target.copy_(source), device, 20)
    return 2 * size / statistics.median(times)
