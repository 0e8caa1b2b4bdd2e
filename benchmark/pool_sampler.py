"""Samples the KV pool's use over time from outside."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PoolSample:
    """One sample of ``/crosspool/status``. Mapped bytes are those of chunks with cached pages or
    with promised pages that have been written."""

    seconds: float
    """``time.perf_counter()`` when it was read."""
    budget_bytes: int
    promised_bytes: int
    cached_bytes: int
    mapped_bytes: int
    waiting: int
    running: int
    by_model: dict[str, dict[str, Any]]
    """Snapshot of each model, by name."""


class PoolSampler:
    """Thread that takes a sample every ``period`` seconds within the ``with``."""

    def __init__(self, port: int, period: float = 0.05) -> None:
        self.samples: list[PoolSample] = []
        self._port = port
        self._period = period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pool sampler", daemon=True)

    def __enter__(self) -> PoolSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Return one field of every sample, float64 [samples]."""
        return np.array([getattr(sample, name) for sample in self.samples], dtype=np.float64)

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        due = time.perf_counter()
        while not self._stop.wait(max(0.0, due - time.perf_counter())):
            due = max(due + self._period, time.perf_counter())
            connection.request("GET", "/crosspool/status")
            self.samples.append(_sample(connection.getresponse().read()))
        connection.close()


def _sample(answer: bytes) -> PoolSample:
    status = msgspec.json.decode(answer)
    models, ranks = status["models"], status["ranks"]
    return PoolSample(
        seconds=time.perf_counter(),
        budget_bytes=sum(rank["budget_bytes"] for rank in ranks),
        promised_bytes=sum(model["promised_bytes"] for model in models),
        cached_bytes=sum(model["cached_bytes"] for model in models),
        mapped_bytes=sum(model["mapped_bytes"] for model in models),
        waiting=sum(model["waiting"] for model in models),
        running=sum(model["running"] for model in models),
        by_model={model["name"]: model for model in models},
    )
