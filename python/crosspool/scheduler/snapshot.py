"""The scheduler's state in plain values, for metrics and the pools' table."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from copy import deepcopy
from typing import Any

import msgspec

from crosspool.config.deployment import Deployment
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.counters import ModelCounters
from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.rates import ModelRates
from crosspool.scheduler.residency import ResidencyPolicy
from crosspool.transport.inspection import (
    KVShare,
    ModelStatus,
    RankSnapshot,
    Snapshot,
)

_SUMMED = ("running", "paused", "promised_chunks", "cached_chunks", "mapped_chunks")


def snapshot(
    deployment: Deployment,
    specs: Seq[ModelSpec],
    *,
    queues: Seq[WaitingQueue],
    ranks: Seq[RankState],
    counters: Seq[ModelCounters],
    rates: Seq[ModelRates],
    residency: ResidencyPolicy,
    now: float,
    max_tokens: Seq[int],
    failure: str | None,
) -> Snapshot:
    size = deployment.chunk_bytes
    by_rank = [_rank(rank, deployment.kv_pool_devices[rank.index].name, size) for rank in ranks]
    models = []
    for index, (model, spec) in enumerate(zip(deployment.models, specs, strict=True)):
        shares = [rank.models[index] for rank in by_rank]
        models.append(
            ModelStatus(
                name=model.name,
                waiting=len(queues[index]),
                waiting_tokens=sum(seq.prompt_len for seq in queues[index]),
                compiling=queues[index].compiling,
                tokens_per_second=rates[index].tokens_per_second(now),
                cache_hit_rate=rates[index].cache_hit_rate(now),
                evicted_pages=sum(share.evicted_pages for share in shares),
                path=model.path,
                context=spec.context,
                dtype=spec.dtype,
                kv_bytes_per_token=spec.kv_bytes_per_token,
                max_tokens=max_tokens[index],
                pool_tokens=deployment.kv_pool_bytes // spec.kv_bytes_per_token,
                ffn_ranks=deployment.ffn_ranks(index),
                residency=residency.status(index, now),
                **_sums(shares, size),
                **msgspec.structs.asdict(deepcopy(counters[index])),
            )
        )
    return Snapshot(models=models, ranks=by_rank, failure=failure)


def _rank(rank: RankState, device: str, chunk_bytes: int) -> RankSnapshot:
    allocator = rank.promises.allocator
    models = [
        KVShare(
            running=len(running),
            paused=len(rank.paused[model]),
            promised_chunks=allocator.promised_chunks(model),
            cached_chunks=allocator.cached_chunks(model),
            mapped_chunks=allocator.mapped_chunks(model),
            evicted_pages=rank.promises.evicted_pages[model],
        )
        for model, running in enumerate(rank.running)
    ]
    return RankSnapshot(
        device=device,
        away=rank.away,
        steps_in_flight=len(rank.flights),
        budget_chunks=allocator.budget_chunks,
        budget_bytes=allocator.budget_chunks * chunk_bytes,
        free_chunks=allocator.free_chunks,
        free_bytes=allocator.free_chunks * chunk_bytes,
        models=models,
        **_sums(models, chunk_bytes),
    )


def _sums(shares: Iterable[KVShare], chunk_bytes: int) -> dict[str, Any]:
    """The sum over ``shares`` of each field in ``_SUMMED``, and chunks in bytes too."""
    sums = {name: sum(getattr(share, name) for share in shares) for name in _SUMMED}
    sizes = {
        name.replace("_chunks", "_bytes"): number * chunk_bytes
        for name, number in sums.items()
        if name.endswith("_chunks")
    }
    return sums | sizes
