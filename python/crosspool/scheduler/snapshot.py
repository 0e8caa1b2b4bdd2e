"""The scheduler's state in plain values, for metrics, the pools' table and whoever asks."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from crosspool.config.deployment import Deployment
from crosspool.scheduler.counters import ModelCounters
from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rank_state import RankState

_KINDS = ("promised", "cached", "mapped")


def snapshot(
    deployment: Deployment,
    queues: Seq[WaitingQueue],
    ranks: Seq[RankState],
    counters: Seq[ModelCounters],
    failure: str | None,
) -> dict[str, Any]:
    """The state now and the counters since the start::

        {"models": [{"name",                            # in the deployment's order
                     "waiting",                         # requests queued, compiling included
                     "compiling", "running",
                     "paused",                          # of those running: wait for more pages
                     "promised_chunks", "cached_chunks", "mapped_chunks",   # over all ranks
                     "promised_bytes", "cached_bytes", "mapped_bytes",
                     "evicted_pages",                   # cached pages given up for promises
                     ...}],                             # ModelCounters' fields
         "ranks": [{"device", "running", "paused", "steps_in_flight",
                    "budget_chunks", "free_chunks", "promised_chunks", "cached_chunks",
                    "mapped_chunks", and the same in bytes,
                    "models": [{"running", "paused", "promised_chunks", "cached_chunks",
                                "mapped_chunks", "evicted_pages"}]}],
         "failure": failure}

    Budget = promised (touched by pages of running requests) + cached (touched by cached pages
    only) + free. Mapped is what lies in physical memory: cached all, promised as far as written.
    """
    size = deployment.chunk_bytes
    by_rank = [_rank(rank, deployment.kv_pool_devices[rank.index].name, size) for rank in ranks]
    models = [
        {
            "name": model.name,
            "waiting": len(queues[index]),
            "compiling": queues[index].compiling,
            **_sums([rank["models"][index] for rank in by_rank], size),
            **counters[index].as_dict(),
        }
        for index, model in enumerate(deployment.models)
    ]
    return {"models": models, "ranks": by_rank, "failure": failure}


def _rank(rank: RankState, device: str, chunk_bytes: int) -> dict[str, Any]:
    allocator = rank.promises.allocator
    models = [
        {
            "running": len(running),
            "paused": len(rank.paused[model]),
            "promised_chunks": allocator.promised_chunks(model),
            "cached_chunks": allocator.cached_chunks(model),
            "mapped_chunks": allocator.mapped_chunks(model),
            "evicted_pages": rank.promises.evicted_pages[model],
        }
        for model, running in enumerate(rank.running)
    ]
    sums = _sums(models, chunk_bytes)
    del sums["evicted_pages"]
    return {
        "device": device,
        "steps_in_flight": len(rank.flights),
        **sums,
        **_in_bytes(
            {"budget": allocator.budget_chunks, "free": allocator.free_chunks}, chunk_bytes
        ),
        "models": models,
    }


def _sums(shares: list[dict[str, Any]], chunk_bytes: int) -> dict[str, int]:
    def total(key: str) -> int:
        return sum(share[key] for share in shares)

    chunks = {kind: total(f"{kind}_chunks") for kind in _KINDS}
    return {
        "running": total("running"),
        "paused": total("paused"),
        **_in_bytes(chunks, chunk_bytes),
        "evicted_pages": total("evicted_pages"),
    }


def _in_bytes(chunks: dict[str, int], chunk_bytes: int) -> dict[str, int]:
    return {f"{name}_chunks": number for name, number in chunks.items()} | {
        f"{name}_bytes": number * chunk_bytes for name, number in chunks.items()
    }
