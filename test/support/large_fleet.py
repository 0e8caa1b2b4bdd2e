"""A scheduler that tells of many models, none of which is there."""

from __future__ import annotations

from typing import Any

import msgspec
from crosspool.transport import admin
from crosspool.transport.inspection import Status

CHUNK = 2 << 20


class LargeFleet:
    """Takes the place of :class:`~crosspool.transport.admin.AsyncAdmin`. At every look the models
    have been idle for a second more, and one of ten has sampled tokens."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.looks = 0

    async def status(self) -> Status:
        self.looks += 1
        numbers = range(len(self.names))
        mapped = {number: number % 3 for number in numbers}
        rank = {
            **{"device": "cpu", "away": False, "running": 0, "paused": 0, "steps_in_flight": 0},
            **{"lanes": 2, "busy_seconds": 0.5 * self.looks},
            **_memory("budget", 1000),
            **_memory("free", 1000 - sum(mapped.values())),
            **_memory("promised", 0),
            **_memory("cached", sum(mapped.values())),
            **_memory("mapped", sum(mapped.values())),
            "models": [
                {
                    **{"model": number, "running": 0, "paused": 0, "promised_chunks": 0},
                    **{"cached_chunks": chunks, "mapped_chunks": chunks, "evicted_pages": 0},
                }
                for number, chunks in mapped.items()
            ],
        }
        told = {
            "models": [self._model(number, chunks) for number, chunks in mapped.items()],
            "ranks": [rank],
            "weights": [
                {"pool": pool, "device": "cpu", "bytes": 7 << 30, "budget_bytes": 8 << 30}
                for pool in ("kv", "weight")
            ],
            "failure": None,
            "ready": True,
            "message": "ready",
            "devices": [{"name": "cpu", "ready": True, "pid": 1, "ranks": []}],
        }
        return msgspec.convert(told, Status)

    def _model(self, number: int, chunks: int) -> dict[str, Any]:
        is_resident = number % 10 == 0
        return {
            **{"model": number, "name": self.names[number], "path": "/nowhere"},
            **dict.fromkeys(("waiting", "waiting_tokens", "compiling", "running", "paused"), 0),
            **_memory("promised", 0),
            **_memory("cached", chunks),
            **_memory("mapped", chunks),
            **{"evicted_pages": 0, "cache_hit_rate": 0.0, "context": 4096, "dtype": "bfloat16"},
            **{"kv_dtype": "bfloat16", "kv_bytes_per_token": 4096, "max_tokens": 4096},
            **{"pool_tokens": 1 << 20, "ffn_ranks": [0], "requests": number},
            "tokens_per_second": 10.0 + self.looks % 7 if is_resident else 0.0,
            "residency": {
                "state": "resident" if is_resident else "asleep",
                **{"keep": "demand", "ttl": None, "priority": 0, "wakes": number % 4},
                **{"attention_bytes": 100 << 20, "ffn_bytes": 600 << 20},
                "idle_seconds": 0.0 if is_resident else 10.0 * number + self.looks,
            },
        }

    async def manage(self, model: str, what: str, keep: str | None = None) -> None:
        raise admin.AdminError(f"{model} is not there")


def _memory(name: str, chunks: int) -> dict[str, int]:
    return {f"{name}_chunks": chunks, f"{name}_bytes": chunks * CHUNK}
