"""The scheduler's state in plain values, for metrics and the pools' table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from copy import deepcopy
from typing import Any

import msgspec

from crosspool.config.deployment import Deployment
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.residency import ResidencyPolicy
from crosspool.scheduler.served_model import ServedModel
from crosspool.transport.inspection import (
    KVShare,
    ModelStatus,
    RankSnapshot,
    Snapshot,
)

_SUMMED = ("running", "paused", "promised_chunks", "cached_chunks", "mapped_chunks")


def snapshot(
    deployment: Deployment,
    served: Mapping[int, ServedModel],
    *,
    ranks: Seq[RankState],
    residency: ResidencyPolicy,
    leaving: Collection[int],
    now: float,
    max_tokens: Mapping[int, int],
    failure: str | None,
) -> Snapshot:
    """``served``: the models that have come; those in ``leaving`` take no requests any more."""
    size = deployment.chunk_bytes
    by_rank = [_rank(rank, served, deployment, size) for rank in ranks]
    models = []
    for place, (number, model) in enumerate(sorted(served.items())):
        shares = [rank.models[place] for rank in by_rank]
        where = residency.status(number, now)
        if number in leaving:
            where = msgspec.structs.replace(where, state="leaving")
        models.append(
            ModelStatus(
                model=number,
                name=model.name,
                waiting=len(model.queue),
                waiting_tokens=sum(seq.prompt_len for seq in model.queue),
                compiling=model.queue.compiling,
                tokens_per_second=model.rates.tokens_per_second(now),
                cache_hit_rate=model.rates.cache_hit_rate(now),
                evicted_pages=sum(share.evicted_pages for share in shares),
                path=deployment.models[number].path,
                context=model.spec.context,
                dtype=model.spec.dtype,
                kv_dtype=model.spec.kv_dtype,
                kv_bytes_per_token=model.spec.kv_bytes_per_token,
                max_tokens=max_tokens[number],
                pool_tokens=deployment.kv_pool_bytes // model.spec.kv_bytes_per_token,
                ffn_ranks=deployment.ffn_ranks(number),
                residency=where,
                **_sums(shares, size),
                **msgspec.structs.asdict(deepcopy(model.counters)),
            )
        )
    return Snapshot(
        models=models,
        ranks=by_rank,
        weights=residency.weights([device.name for device in deployment.devices]),
        failure=failure,
    )


def _rank(
    rank: RankState, served: Collection[int], deployment: Deployment, chunk_bytes: int
) -> RankSnapshot:
    allocator = rank.promises.allocator
    models = [
        KVShare(
            model=model,
            running=len(rank.running[model]),
            paused=len(rank.paused[model]),
            promised_chunks=allocator.promised_chunks(model),
            cached_chunks=allocator.cached_chunks(model),
            mapped_chunks=allocator.mapped_chunks(model),
            evicted_pages=rank.promises.evicted_pages[model],
        )
        for model in sorted(served)
    ]
    return RankSnapshot(
        device=deployment.kv_pool_devices[rank.index].name,
        away=rank.away,
        steps_in_flight=len(rank.flights),
        lanes=deployment.lanes,
        busy_seconds=rank.busy_seconds,
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
