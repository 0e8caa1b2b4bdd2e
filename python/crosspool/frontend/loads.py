"""A model's load in the words of SGLang's ``/v1/loads``, which routers read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from sglang.srt.managers.load_snapshot import LoadSnapshot, QueueMetrics

from crosspool.transport.inspection import ModelStatus


def check_sections(include: Sequence[str] | None) -> None:
    """Raises ValueError, with a text for the client, for a section that SGLang does not have."""
    for name in include or ():
        if name not in LoadSnapshot.VALID_SECTIONS:
            known = ", ".join(sorted(LoadSnapshot.VALID_SECTIONS))
            raise ValueError(f"`include`: there is no section {name!r}; there are {known}")


def load_of(state: dict[str, Any], max_running_requests: int) -> LoadSnapshot:
    """``state`` has the fields of the model's ModelStatus, as the scheduler sent them."""
    model = msgspec.convert(state, ModelStatus)
    return LoadSnapshot(
        timestamp=time.time(),
        num_running_reqs=model.running,
        num_waiting_reqs=model.waiting,
        num_waiting_uncached_tokens=int(model.waiting_tokens * (1 - model.cache_hit_rate)),
        num_used_tokens=model.used_tokens,
        num_total_tokens=model.used_tokens + model.waiting_tokens,
        num_active_tokens=model.used_tokens + model.waiting_tokens,
        max_total_num_tokens=model.pool_tokens,
        max_running_requests=max_running_requests,
        token_usage=round(model.token_usage, 4),
        gen_throughput=round(model.tokens_per_second, 2),
        cache_hit_rate=round(model.cache_hit_rate, 4),
        utilization=round(model.running / max_running_requests, 4),
        total_prefill_uncached_tokens=model.prompt_tokens,
        queues=QueueMetrics(
            waiting=model.waiting - model.compiling,
            grammar=model.compiling,
            paused=model.paused,
            retracted=0,
            prealloc_ready=0,
        ),
    )
